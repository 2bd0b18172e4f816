"""``masks make`` gives the masks of the Python functions, from files, whatever their size."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import sparse_comm
from sparse_comm.cli import main
from tests.cli.command import COMMAND, Done, Terminal, call, environment, heed_ctrl_c, refused
from tests.cli.models import mixed_model, save, save_sharded
from tests.launch import CONTEXT


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


def made(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> dict[str, torch.Tensor]:
    output = model.parent / "made.safetensors"
    done = call(capsys, "masks", "make", model, *options, "-o", output, "--force")
    assert done.status == 0, done.err
    return sparse_comm.load_masks(output)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", ["0", "0.37", "0.9", "1"])
def test_masks_are_those_of_prune_magnitude_ties_and_mixed_dtypes_included(
    tmp_path, capsys, scope, sparsity
):
    model = mixed_model()
    file = save(model, tmp_path / "model.safetensors")
    expected = sparse_comm.prune.magnitude(model, float(sparsity), scope)
    assert are_equal(made(capsys, file, "--sparsity", sparsity, "--scope", scope), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_are_those_of_prune_magnitude_in_each_dtype(tmp_path, capsys, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)).to(dtype)
    file = save(model, tmp_path / "model.safetensors")
    expected = sparse_comm.prune.magnitude(model, 0.8)
    assert are_equal(made(capsys, file, "--sparsity", "0.8"), expected)


def test_a_sharded_model_is_read_by_its_index_or_its_folder(tmp_path, capsys):
    model = mixed_model()
    folder = save_sharded(model, tmp_path / "shards")
    expected = sparse_comm.prune.magnitude(model, 0.7)
    for path in (folder, folder / "model.safetensors.index.json"):
        assert are_equal(made(capsys, path, "--sparsity", "0.7"), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_what_save_pretrained_wrote_is_read_shards_and_tied_weights_included(
    tmp_path, capsys, tied
):
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=11,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert (tmp_path / "saved" / "model.safetensors.index.json").is_file()
    masks = made(capsys, tmp_path / "saved", "--sparsity", "0.8")
    assert are_equal(masks, sparse_comm.prune.magnitude(model, 0.8))
    sparse_comm.compact(model, masks)


def test_a_folder_with_one_model_and_other_files_is_read(tmp_path, capsys):
    model = mixed_model()
    save(model, tmp_path / "model.safetensors")
    sparse_comm.save_masks({}, tmp_path / "old-masks.safetensors")
    (tmp_path / "config.json").write_text("{}")
    masks = made(capsys, tmp_path, "--sparsity", "0.7")
    assert are_equal(masks, sparse_comm.prune.magnitude(model, 0.7))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--names", "layers.*"], lambda name, p: name.startswith("layers.")),
        (["--names", "layers.*", "alpha.*"], lambda name, p: name[:6] in ("layers", "alpha.")),
        (
            ["--names", "layers.*", "--names", "zeta.*"],
            lambda name, p: name[:4] in ("laye", "zeta"),
        ),
        (["--names", "norm.weight", "alpha.weight"], ["alpha.weight", "norm.weight"]),
        (["--exclude", "*zeta*", "conv.weight"], lambda n, p: n[:4] not in ("zeta", "conv")),
        (["--exclude", "*.bias"], None),
    ],
)
def test_globs_pick_as_names_of_prune_magnitude_do(tmp_path, capsys, options, names):
    model = mixed_model()
    file = save(model, tmp_path / "model.safetensors")
    expected = sparse_comm.prune.magnitude(model, 0.6, names=names)
    assert are_equal(made(capsys, file, "--sparsity", "0.6", *options), expected)


def test_from_zeros_gives_the_masks_of_masks_from_zeros(tmp_path, capsys):
    model = mixed_model()
    file = save(model, tmp_path / "model.safetensors")  # rounding left zeros in every tensor
    expected = sparse_comm.masks_from_zeros(model)
    assert len(expected) > 5
    assert are_equal(made(capsys, file, "--from-zeros"), expected)


def test_from_zeros_warns_of_what_is_all_zero_and_of_a_padding_row(tmp_path, capsys):
    weights = {"dense": torch.ones(3, 4), "lora_B": torch.zeros(3, 4), "pruned": torch.eye(4)}
    weights["embed"] = torch.cat([torch.zeros(1, 4), torch.ones(5, 4)])
    safetensors.torch.save_file(weights, tmp_path / "m")
    done = call(capsys, "masks", "make", tmp_path / "m", "--from-zeros", "-o", tmp_path / "o")
    assert done.status == 0
    assert "warning: embed is zero in just one row, like the padding row" in done.err
    assert "warning: lora_B is all zero and gets no mask" in done.err
    assert set(sparse_comm.load_masks(tmp_path / "o")) == {"embed", "pruned"}


def test_the_report_counts_and_its_code_runs(tmp_path, capsys):
    model = mixed_model()
    file = save(model, tmp_path / "model.safetensors")
    output = tmp_path / "made.safetensors"
    options = ["--sparsity", "0.9", "--scope", "layer", "-o", output]
    done = call(capsys, "masks", "make", file, *options)
    masks = sparse_comm.load_masks(output)
    total = sum(mask.numel() for mask in masks.values())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert f"{100 * pruned / total:.2f} % pruned: {pruned:,} of {total:,} entries" in done.out
    assert "tensors that stay dense: 1 of I64, 15 of one dimension or none\n" in done.out
    assert "… 4 in between …" in done.out  # 14 masks, of which the table shows 10
    (code,) = re.findall(r"Next, in Python: (.*)", done.out)
    exec(code, {"sparse_comm": sparse_comm, "model": model})
    assert sparse_comm.is_compact(model)


def test_a_tensor_of_which_nothing_is_left_is_warned_of(tmp_path, capsys):
    weights = {"small": torch.full((3, 3), 0.1), "large": torch.full((3, 3), 7.0)}
    safetensors.torch.save_file(weights, tmp_path / "m")
    arguments = "masks", "make", tmp_path / "m", "--sparsity", "0.5", "-o", tmp_path / "o"
    assert "warning: nothing of small is left" in call(capsys, *arguments).err


def test_an_unaligned_file_of_another_writer_is_read(tmp_path, capsys):
    table = {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}
    for padding in range(8):
        head = json.dumps(table).encode() + b" " * padding
        data = torch.arange(16, dtype=torch.float32).numpy().tobytes()
        (tmp_path / "m").write_bytes(struct.pack("<Q", len(head)) + head + data)
        masks = made(capsys, tmp_path / "m", "--sparsity", "0.75")
        assert masks["w"].tolist() == [[False] * 4] * 3 + [[True] * 4]


# ---------------------------------------------------------------- cut short, large


def make_with_a_limit_on_file_sizes(folder: Path, at_limit: object) -> None:
    """A disk that is full after some kB: part of the masks are written, then an error."""
    signal.signal(signal.SIGXFSZ, at_limit)
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    arguments = ["masks", "make", folder / "m", "--sparsity", "0.5", "-o", folder / "o", "--force"]
    os._exit(main([str(argument) for argument in arguments]))


@pytest.mark.parametrize(
    ("at_limit", "status", "message"),
    [
        (
            signal.SIG_IGN,
            1,
            "make: .*o: masks not saved, File too large; an older file is untouched",
        ),
        (signal.default_int_handler, 130, "make: stopped"),  # Ctrl-C in the middle of the write
    ],
)
def test_a_write_that_fails_or_is_stopped_leaves_the_old_file_and_no_other(
    tmp_path, at_limit, status, message
):
    (tmp_path / "m").write_bytes(safetensors.torch.save({"w": torch.ones(300, 400)}))
    (tmp_path / "o").write_text("precious")
    process = CONTEXT.Process(target=make_with_a_limit_on_file_sizes, args=(tmp_path, at_limit))
    process.start()
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert refused(Done(process.exitcode, "", said), status, message), (process.exitcode, said)
    assert set(os.listdir(tmp_path)) == {"m", "o", "said"}
    assert (tmp_path / "o").read_text() == "precious"


def write_zeros(path: Path, tensors: int, numel: int) -> None:
    """A model of bf16 zeros that takes no disk: its file is a hole."""
    size = 2 * numel
    table = {
        f"layers.{i}.weight": {
            "dtype": "BF16",
            "shape": [numel // 1024, 1024],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }
    head = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + tensors * size)


def test_ctrl_c_in_the_middle_of_the_work_leaves_nothing_behind(tmp_path):
    write_zeros(tmp_path / "m", 64, 1 << 24)
    process = subprocess.Popen(
        [*COMMAND, "masks", "make", tmp_path / "m", "--sparsity", "0.5", "-o", tmp_path / "o"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        while f"{tmp_path}/m" not in maps.read_text():  # it has not begun to read
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert refused(Done(process.returncode, out, err), 130, "make: stopped$")
    assert os.listdir(tmp_path) == ["m"]


def test_a_long_run_shows_a_bar_on_a_terminal(tmp_path):
    write_zeros(tmp_path / "m", 64, 1 << 24)
    options = ["--sparsity", "0.5", "-o", tmp_path / "o"]
    terminal = Terminal(80, "masks", "make", tmp_path / "m", *options)
    terminal.read_until("ranking weights")
    terminal.process.send_signal(signal.SIGINT)
    done = terminal.finish()
    assert done.status == 130 and "stopped" in done.out


def peak_memory(path: Path, arguments: Sequence[str]) -> None:
    """Write by how much the command raised this process's peak of resident memory, in bytes."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    assert main(arguments) == 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path.write_text(str((peak - baseline) * 1024))


def test_memory_is_bounded_by_a_tensor_and_the_masks_as_bits(tmp_path):
    entries = 24 << 22
    write_zeros(tmp_path / "m", 24, 1 << 22)
    model, masks = str(tmp_path / "m"), str(tmp_path / "o")
    commands = {
        # 8 MiB of one tensor, 12 MiB of bits three times when they are saved, and temporaries.
        "make": ["masks", "make", model, "--sparsity", "0.9", "-o", masks],
        "show": ["masks", "show", masks],
    }
    peaks = {}
    for name, arguments in commands.items():
        process = CONTEXT.Process(target=peak_memory, args=(tmp_path / name, arguments))
        process.start()
        process.join(120)
        peaks[name] = int((tmp_path / name).read_text())
    assert peaks["make"] < 2 * entries * 0.75  # of the model's bytes
    assert peaks["show"] < entries * 0.75  # of the masks' as bool
