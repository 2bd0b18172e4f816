"""A file of masks gives back exactly what was saved, or says what is wrong with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparse_comm
from tests.launch import CONTEXT

arrays = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20))


def some_masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"blocks.0.weight": (13, 7), "blocks.1.weight": (4, 4, 3), "head": (70,)}
    return {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in shapes.items()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        b[n].dtype == torch.bool and a[n].shape == b[n].shape and torch.equal(a[n], b[n]) for n in a
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("masks")


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=8), arrays, max_size=4))
@example({"__metadata__": np.ones(3, bool), "": np.zeros((2, 2), bool)})
@example({'"': np.ones(1, bool), "\\": np.ones(2, bool), "\ud800": np.ones(3, bool)})
@example({"größe/权重.重み 🙂\n\0": np.ones((1, 65), bool)})
@example({"0-d": np.ones((), bool), "empty": np.ones((0, 4), bool), "full": np.ones((8, 8), bool)})
def test_any_names_and_masks_come_back(folder, named):
    masks = {name: torch.from_numpy(array) for name, array in named.items()}
    sparse_comm.save_masks(masks, folder / "any.safetensors")
    assert are_equal(masks, sparse_comm.load_masks(folder / "any.safetensors"))


def test_a_string_and_a_path_name_the_same_file(tmp_path):
    masks = some_masks()
    sparse_comm.save_masks(masks, str(tmp_path / "m"))
    assert are_equal(masks, sparse_comm.load_masks(str(tmp_path / "m")))
    assert are_equal(masks, sparse_comm.load_masks(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]


def test_a_mask_takes_one_bit_an_entry(tmp_path):
    sparse_comm.save_masks({"w": torch.ones(1000, 1000, dtype=torch.bool)}, tmp_path / "m")
    assert 125_000 < (tmp_path / "m").stat().st_size < 125_500


def test_equal_masks_give_equal_bytes_whatever_their_order_and_memory_layout(tmp_path):
    masks = some_masks()
    other = {name: torch.stack([masks[name]] * 2, -1)[..., 0] for name in reversed(masks)}
    sparse_comm.save_masks(masks, tmp_path / "a")
    sparse_comm.save_masks(other, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_is_plain_safetensors_with_the_patterns_bitmaps(tmp_path):
    masks = some_masks()
    sparse_comm.save_masks(masks, tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m")
    assert set(tensors) == {json.dumps(name) for name in masks}
    for name, mask in masks.items():
        bitmap = sparse_comm.SparsityPattern(mask).bitmap
        assert torch.equal(tensors[json.dumps(name)], bitmap)


def test_loaded_masks_can_be_written_to(tmp_path):
    sparse_comm.save_masks(some_masks(), tmp_path / "m")
    loaded = sparse_comm.load_masks(tmp_path / "m")
    loaded["head"].zero_()
    assert are_equal(some_masks(), sparse_comm.load_masks(tmp_path / "m"))


def test_a_new_file_has_the_permissions_of_any_new_file_and_a_link_is_followed(tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    sparse_comm.save_masks(some_masks(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"w": torch.ones(3)}, "mask for 'w' must have dtype torch.bool, got torch.float32"),
        ({"w": [True]}, "mask for 'w' must be a torch.Tensor, got list"),
        ({"w": torch.ones(3, dtype=torch.bool, device="meta")}, "'w' is on the meta device"),
        ({3: torch.ones(3, dtype=torch.bool)}, "named by strings, got 3"),
        ([torch.ones(3, dtype=torch.bool)], "must be a dict of bool tensors by name, got list"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_dict_of_masks_is_refused_and_the_old_file_stays(tmp_path, masks, message):
    sparse_comm.save_masks(some_masks(), tmp_path / "m")
    with pytest.raises(TypeError, match=message):
        sparse_comm.save_masks(masks, tmp_path / "m")
    assert are_equal(some_masks(), sparse_comm.load_masks(tmp_path / "m"))


# ---------------------------------------------------------------- a save cut short


def save_with_a_limit_on_file_sizes(path: Path, limit: int, at_limit: signal.Handlers) -> None:
    signal.signal(signal.SIGXFSZ, at_limit)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        sparse_comm.save_masks({"w": torch.ones(80_000, dtype=torch.bool)}, path)
    except OSError as error:
        # What a full disk looks like, too: part of the bytes are written, then an error.
        text = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.write(1, text.encode())
        os._exit(7 if str(path) in text and "an older file is untouched" in text else 8)


def exit_code(function, *args) -> int | None:
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def test_a_failing_write_leaves_the_old_file_and_no_other_and_names_the_file(tmp_path):
    path = tmp_path / "m"
    sparse_comm.save_masks(some_masks(), path)
    code = exit_code(save_with_a_limit_on_file_sizes, path, 5000, signal.SIG_IGN)
    assert code == 7
    assert os.listdir(tmp_path) == ["m"]
    assert are_equal(some_masks(), sparse_comm.load_masks(path))


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m"
    sparse_comm.save_masks(some_masks(), path)
    code = exit_code(save_with_a_limit_on_file_sizes, path, 5000, signal.SIG_DFL)
    assert code == -signal.SIGXFSZ
    (draft,) = set(os.listdir(tmp_path)) - {"m"}
    assert (tmp_path / draft).stat().st_size == 5000  # it was in the middle
    assert are_equal(some_masks(), sparse_comm.load_masks(path))
    sparse_comm.save_masks({}, path)  # and the next save works
    assert sparse_comm.load_masks(path) == {}


def save_for_ever(path: Path) -> None:
    both = [{"w": torch.full((10_000_000,), bool(value))} for value in (0, 1)]
    while True:
        for masks in both:
            sparse_comm.save_masks(masks, path)


@pytest.mark.parametrize("delay", [0.01, 0.023, 0.04])
def test_kill_9_at_any_time_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "m"
    process = CONTEXT.Process(target=save_for_ever, args=(path,))
    process.start()
    try:
        while not path.exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        process.kill()
        process.join()
    mask = sparse_comm.load_masks(path)["w"]
    assert mask.shape == (10_000_000,) and (bool(mask.all()) or not mask.any())


def test_processes_that_save_at_the_same_time_leave_one_whole_file(tmp_path):
    path = tmp_path / "m"
    processes = [CONTEXT.Process(target=save_for_ever, args=(path,)) for _ in range(2)]
    for process in processes:
        process.start()
    try:
        while not path.exists():
            assert all(process.is_alive() for process in processes)
            time.sleep(0.001)
        for _ in range(5):
            mask = sparse_comm.load_masks(path)["w"]
            assert bool(mask.all()) or not mask.any()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert multiprocessing.active_children() == []


def test_saving_where_no_file_can_be_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"masks not saved.*nowhere/m"):
        sparse_comm.save_masks(some_masks(), tmp_path / "nowhere" / "m")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        sparse_comm.save_masks(some_masks(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


# ---------------------------------------------------------------- files that hold no masks


def test_a_missing_file_and_a_folder_raise_pythons_own_errors_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors"):
        sparse_comm.load_masks(tmp_path / "missing.safetensors")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        sparse_comm.load_masks(tmp_path)


def test_a_file_of_another_kind_is_named_and_told_what_to_do(tmp_path):
    path = tmp_path / "file"
    path.write_text("these are not the masks you are looking for")
    with pytest.raises(ValueError, match=r"file' is not a safetensors file.*save the masks again"):
        sparse_comm.load_masks(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="file' is cut short or damaged: the file is empty; save"):
        sparse_comm.load_masks(path)
    torch.save(some_masks(), path)
    with pytest.raises(ValueError, match="file' is not a safetensors file"):
        sparse_comm.load_masks(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"file' is a safetensors.*no masks.*masks_from_zeros"):
        sparse_comm.load_masks(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no masks"):
        sparse_comm.load_masks(path)


def test_a_file_cut_short_at_any_byte_is_refused(tmp_path):
    path = tmp_path / "m"
    sparse_comm.save_masks(some_masks(), path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"m' is cut short or damaged.*save the masks again"):
            sparse_comm.load_masks(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="m' is cut short or damaged"):
        sparse_comm.load_masks(path)


def test_any_flipped_bit_in_header_or_data_is_noticed_and_the_file_named(tmp_path):
    path = tmp_path / "m"
    sparse_comm.save_masks({"w": torch.rand(13, 7) < 0.5}, path)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="m' "):
                sparse_comm.load_masks(path)


def rewrite(path: Path, table: object, **tensors: np.ndarray) -> None:
    named = {json.dumps(name): array for name, array in tensors.items()}
    safetensors.numpy.save_file(named, path, {"sparse_comm.masks": json.dumps(table)})


def test_a_file_of_a_later_version_asks_for_a_newer_sparse_comm(tmp_path):
    rewrite(tmp_path / "m", {"version": 2, "masks": {}})
    with pytest.raises(ValueError, match=r"m' has version 2.*reads version 1.*newer sparse_comm"):
        sparse_comm.load_masks(tmp_path / "m")


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"masks": {}},
        {"version": 1},
        {"version": 1, "masks": []},
        {"version": 1, "masks": {"w": [[64]]}},
        {"version": 1, "masks": {"w": 3}},
        {"version": 1, "masks": {"w": [[-64], "00"]}},
        {"version": 1, "masks": {"w": [["64"], "00"]}},
        {"version": 1, "masks": {"w": [64, "00"]}},
        {"version": 1, "masks": {"w": [[1 << 80], "00"]}},
        {"version": 1, "masks": {"w": [[64], "00"]}},
        {"version": 1, "masks": {"w": [[64], None]}},
        {"version": 1, "masks": {"v": [[64], "00"]}},
        {"version": 1, "masks": {}},
    ],
)
def test_a_table_that_does_not_fit_the_bits_is_refused(tmp_path, table):
    rewrite(tmp_path / "m", table, w=np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match="m' is cut short or damaged"):
        sparse_comm.load_masks(tmp_path / "m")
