"""What ``masks make`` refuses: one line, status 1 or 2, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import sparse_comm
from tests.cli.command import call, refused
from tests.cli.models import mixed_model, save, save_sharded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "90"], "from 0 to 1 is expected, got '90'; for 90 % write 0.9"),
        (["--sparsity", "-0.5"], "from 0 to 1 is expected, got '-0.5'"),
        (["--sparsity", "nan"], "from 0 to 1 is expected, got 'nan'"),
        (["--sparsity", "much"], "from 0 to 1 is expected, got 'much'"),
        (["--sparsity", "0.5", "--scope", "row"], "invalid choice: 'row'"),
        (["--sparsity", "0.5", "--from-zeros"], "not allowed with"),
        (["--from-zeros", "--scope", "layer"], "--scope goes with --sparsity"),
        (["--sparsity", "0.5", "--names", "a", "--exclude", "b"], "not allowed with"),
        ([], "one of the arguments --sparsity --from-zeros is required"),
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2_and_one_line(
    tmp_path, capsys, options, message
):
    file = save(nn.Linear(3, 3), tmp_path / "m")
    done = call(capsys, "masks", "make", file, *options, "-o", tmp_path / "o")
    assert refused(done, 2, message), done
    assert os.listdir(tmp_path) == ["m"]


def test_the_model_and_the_output_have_to_be_given(tmp_path, capsys):
    assert refused(call(capsys, "masks", "make", "--sparsity", "0.5", "-o", "o"), 2, "MODEL")
    assert refused(call(capsys, "masks", "make", "m", "--sparsity", "0.5"), 2, "-o/--output")


def with_nan() -> bytes:
    return safetensors.torch.save({"a": torch.ones(2, 2), "b": torch.tensor([[1.0, torch.nan]])})


def of(*tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save({str(i): tensor for i, tensor in enumerate(tensors)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"m\.safetensors: No such file or directory"),
        (b"", "is not a safetensors file: it is empty"),
        (b"once upon a time", "is not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS: run git lfs pull"),
        (
            b"PK\x03\x04 0123456789",
            r"a pickle, as torch.save writes.*safetensors\.torch\.save_file",
        ),
        (of(torch.ones(9, 9))[:-1], "is cut short or damaged"),
        (of(torch.ones(9, 9))[:5], "is cut short or damaged"),
        (of(torch.ones(9)), "none of floating point has two or more dim.*dense_state_dict"),
        (of(torch.ones(9, 9).int()), "F64, F32, F16 and BF16 can be, the model has I32"),
        (of(torch.ones(9, 9).to(torch.float8_e5m2)), "the model has F8_E5M2"),
        (of(), "the model has none at all"),
        (with_nan(), "'b' holds NaN"),
    ],
)
def test_a_model_that_cannot_be_pruned_ends_with_1_and_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "m.safetensors"
    if content is not None:
        file.write_bytes(content)
    for scope in ("global", "layer"):
        options = ["--sparsity", "0.5", "--scope", scope, "-o", tmp_path / "o"]
        done = call(capsys, "masks", "make", file, *options)
        assert refused(done, 1, message), done
    assert set(os.listdir(tmp_path)) <= {"m.safetensors"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--names", "layers.0.weigth"],
            r"fits 'layers.0.weigth'; did you mean 'layers.\d.weight'?",
        ),
        (
            ["--exclude", "*embedding*"],
            r"no floating-point tensor of the model fits '\*embedding\*'",
        ),
        (["--names", "codes.0"], "'codes.0' has dtype I64"),
        (["--names", "norm.*"], r"'norm.\*' fits only tensors of one dim.*such as 'norm.bias'"),
        (["--exclude", "*"], "no tensor to prune is left: --exclude leaves out all"),
    ],
)
def test_names_that_fit_nothing_are_refused(tmp_path, capsys, options, message):
    file = save(mixed_model(), tmp_path / "m")
    done = call(capsys, "masks", "make", file, "--sparsity", "0.5", "-o", tmp_path / "o", *options)
    assert refused(done, 1, message), done


def test_a_model_without_zeros_is_no_pruned_one(tmp_path, capsys):
    (tmp_path / "m").write_bytes(of(torch.ones(4, 4)))
    done = call(capsys, "masks", "make", tmp_path / "m", "--from-zeros", "-o", tmp_path / "o")
    assert refused(done, 1, "no tensor is partly zero.*use --sparsity"), done


def break_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: os.remove(f / "model-00002-of-00003.safetensors"),
            "00002-of-00003.* is missing",
        ),
        (lambda f: break_index(f, "{"), "is no index of shards"),
        (lambda f: break_index(f, '{"weight_map": ["a"]}'), "is no index of shards"),
        (lambda f: break_index(f, '{"weight_map": {"a": 3}}'), "is no index of shards"),
        (lambda f: break_index(f, '{"weight_map": {}}'), "names no tensors"),
        (
            lambda f: break_index(
                f, '{"weight_map": {"lost": "model-00001-of-00003.safetensors"}}'
            ),
            "holds no tensor 'lost', which its index looks for",
        ),
        (
            lambda f: os.remove(f / "model.safetensors.index.json"),
            "holds 3 models .*or get the index of the shards, too",
        ),
    ],
)
def test_shards_that_do_not_fit_their_index_are_refused(tmp_path, capsys, damage, message):
    folder = save_sharded(mixed_model(), tmp_path / "shards")
    damage(folder)
    done = call(capsys, "masks", "make", folder, "--sparsity", "0.5", "-o", tmp_path / "o")
    assert refused(done, 1, message), done
    assert not (tmp_path / "o").exists()


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    done = call(capsys, "masks", "make", tmp_path, "--sparsity", "0.5", "-o", tmp_path / "o")
    assert refused(done, 1, r"holds no \.safetensors file"), done


def test_an_output_that_exists_is_replaced_only_with_force(tmp_path, capsys):
    file, output = save(nn.Linear(3, 3), tmp_path / "m"), tmp_path / "o"
    output.write_text("precious")
    arguments = ["masks", "make", file, "--sparsity", "0.5", "-o", output]
    assert refused(call(capsys, *arguments), 1, "exists: --force replaces it")
    assert output.read_text() == "precious"
    assert call(capsys, *arguments, "--force").status == 0
    assert list(sparse_comm.load_masks(output)) == ["weight"]


def test_the_model_itself_is_never_replaced(tmp_path, capsys):
    folder = save_sharded(mixed_model(), tmp_path / "shards")
    (tmp_path / "link").symlink_to(folder / "model-00001-of-00003.safetensors")
    for output in (folder / "model-00003-of-00003.safetensors", tmp_path / "link"):
        options = ["--sparsity", "0.5", "-o", output, "--force"]
        done = call(capsys, "masks", "make", folder, *options)
        assert refused(done, 1, "the masks would replace the model"), done


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/o", "there is no folder .*nowhere"),
        ("folder", "is there and not an ordinary file"),
        ("fifo", "is there and not an ordinary file"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, capsys, output, message):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "m").write_bytes(with_nan())  # which would be the error of the work
    options = ["--sparsity", "0.5", "-o", tmp_path / output, "--force"]
    done = call(capsys, "masks", "make", tmp_path / "m", *options)
    assert refused(done, 1, message), done
