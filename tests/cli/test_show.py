"""``masks show`` says what ``load_masks`` and ``SparsityPattern`` say, as a table or as JSON."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_comm
from sparse_comm.cli.show import _is_two_of_four
from tests.cli.command import Terminal, call

WIDE = {"model.layers.2.mlp.gate_proj.weight": (64, 1000), "model.layers.10.norm": (32,)}


def some_masks(shapes=WIDE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}
    masks["half"] = torch.tensor([True, False, False, True]).repeat(6, 2)
    return masks


def shown(capsys, path) -> dict:
    done = call(capsys, "masks", "show", path, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


def test_json_says_of_each_mask_what_its_pattern_says(tmp_path, capsys):
    masks = some_masks()
    masks |= {"0-d": torch.tensor(True), "empty": torch.ones(0, 4, dtype=torch.bool)}
    sparse_comm.save_masks(masks, tmp_path / "m")
    content = shown(capsys, tmp_path / "m")
    assert {mask["name"] for mask in content["masks"]} == set(masks)
    for mask in content["masks"]:
        pattern = sparse_comm.SparsityPattern(masks[mask["name"]])
        assert mask["shape"] == list(pattern.shape)
        assert (mask["numel"], mask["nnz"]) == (pattern.numel, pattern.nnz)
        assert mask["density"] == pattern.density
        assert mask["sparsity"] == pytest.approx(1 - pattern.density)
        assert (mask["digest"], mask["bytes"]) == (pattern.digest(), pattern.nbytes)
    for key in ("numel", "nnz", "bytes"):
        assert content["total"][key] == sum(mask[key] for mask in content["masks"])
    assert content["file_bytes"] == (tmp_path / "m").stat().st_size


def test_the_table_has_a_line_a_mask_in_natural_order_and_a_total(tmp_path, capsys):
    masks = some_masks()
    sparse_comm.save_masks(masks, tmp_path / "m")
    done = call(capsys, "masks", "show", tmp_path / "m")
    lines = [line.split() for line in done.out.splitlines()]
    head = ["mask", "shape", "nnz", "density", "sparsity", "N:M", "digest", "size"]
    assert lines[0] == head
    names = [line[0] for line in lines[2:5]]
    assert names == ["half", "model.layers.2.mlp.gate_proj.weight", "model.layers.10.norm"]
    digest = sparse_comm.SparsityPattern(masks["half"]).digest()
    assert lines[2][1:7] == ["6×8", "24", "0.5000", "0.5000", "2:4", digest[:8]]
    total = sum(int(mask.sum()) for mask in masks.values())
    assert lines[6][:3] == ["3", "masks", f"{total:,}"]


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), max_size=3), st.integers(0, 2**32 - 1), st.floats(0, 0.6))
def test_two_of_four_is_read_off_the_bitmap_as_is_n_m_says(shape, seed, density):
    generator = torch.Generator().manual_seed(seed)
    pattern = sparse_comm.SparsityPattern(torch.rand(shape, generator=generator) < density)
    expected = bool(shape) and shape[-1] % 4 == 0 and pattern.is_n_m(2, 4)
    assert _is_two_of_four(pattern) == expected


def test_a_file_of_no_masks_is_shown_as_such(tmp_path, capsys):
    sparse_comm.save_masks({}, tmp_path / "m")
    assert shown(capsys, tmp_path / "m")["masks"] == []
    assert "0 masks" in call(capsys, "masks", "show", tmp_path / "m").out


def test_a_pipe_gets_whole_lines_whatever_their_length(tmp_path, capsys):
    name = "encoder." * 40
    sparse_comm.save_masks({name: torch.ones(3, 3, dtype=torch.bool)}, tmp_path / "m")
    lines = call(capsys, "masks", "show", tmp_path / "m").out.splitlines()
    assert lines[2].startswith(f"{name}  3×3")
    assert all(line == line.rstrip() for line in lines)


def test_a_narrow_terminal_loses_columns_and_is_told_which_but_no_name(tmp_path):
    masks = some_masks()
    sparse_comm.save_masks(masks, tmp_path / "m")
    done = Terminal(60, "masks", "show", tmp_path / "m", NO_COLOR="1").finish()
    assert done.status == 0
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 60 + len("\x1b[1m\x1b[0m") * 12  # bold is no colour
    assert all(any(line.startswith(name) for line in lines) for name in masks)
    assert "(no room for " in done.out and "digest" in done.out and "--json)" in done.out


def test_names_that_would_disturb_the_terminal_are_escaped(tmp_path, capsys):
    names = ["\x1b[31mred", "[bold]x[/bold]", ":smile:", "a\nb", "größe/权重"]
    sparse_comm.save_masks(dict.fromkeys(names, torch.ones(2, dtype=torch.bool)), tmp_path / "m")
    out = call(capsys, "masks", "show", tmp_path / "m").out
    assert "\x1b" not in out and len(out.splitlines()) == 2 + len(names) + 3
    for name in ('"\\u001b[31mred"', "[bold]x[/bold]", ":smile:", '"a\\nb"', "größe/权重"):
        assert f"{name} " in out
    assert {mask["name"] for mask in shown(capsys, tmp_path / "m")["masks"]} == set(names)


# ---------------------------------------------------------------- what is refused


def refusal(capsys, path) -> str:
    done = call(capsys, "masks", "show", path)
    assert done.status == 1 and done.out == "" and done.err.count("\n") == 1, done
    return done.err


def test_what_is_no_file_of_masks_ends_with_1_and_one_line(tmp_path, capsys):
    path = tmp_path / "m"
    assert refusal(capsys, path) == f"sparse-comm masks show: {path}: No such file or directory\n"
    assert "Is a directory" in refusal(capsys, tmp_path)
    path.write_text("these are not the masks you are looking for")
    assert "is not a safetensors file" in refusal(capsys, path)
    path.write_bytes(b"")
    assert "the file is empty" in refusal(capsys, path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    assert f"sparse-comm masks make {path} --from-zeros" in refusal(capsys, path)


def test_a_file_that_load_masks_refuses_is_refused_alike(tmp_path, capsys):
    path = tmp_path / "m"
    sparse_comm.save_masks({"w": torch.rand(13, 7) < 0.5}, path)
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="m' "):
            sparse_comm.load_masks(path)
        assert f"{path}" in refusal(capsys, path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert "cut short or damaged" in refusal(capsys, path)


def test_a_mask_that_is_too_many_or_too_few_is_refused(tmp_path, capsys):
    path = tmp_path / "m"
    sparse_comm.save_masks(some_masks(), path)
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    safetensors.torch.save_file({**tensors, "more": torch.zeros(8)}, path, metadata)
    assert "the tensor more belongs to no mask" in refusal(capsys, path)
    del tensors['"half"']
    safetensors.torch.save_file(tensors, path, metadata)
    assert "the bits of mask 'half'" in refusal(capsys, path)
