"""Pack and expand refuse what does not fit before they touch memory; nothing else is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_comm import SparsityPattern
from sparse_comm.kernels import expand, ops, pack, use_backend

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
BACKENDS = [None, "reference"]
GUARD = 64  # entries on either side of out that must stay as they are


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    use_backend(request.param)
    yield request.param
    use_backend(None)


def pattern_of(numel: int, seed: int = 0) -> SparsityPattern:
    return SparsityPattern(torch.from_numpy(np.random.default_rng(seed).random(numel) < 0.3))


def guarded(numel: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of 7s, and the middle of it."""
    whole = torch.full((numel + 2 * GUARD,), 7, dtype=dtype)
    return whole, whole[GUARD : GUARD + numel]


PATTERN = pattern_of(5000)
NNZ = PATTERN.nnz
BITMAP, OFFSETS = PATTERN.bitmap, PATTERN.offsets
MISFITS = {
    "too few values": (NNZ - 1, 5000, BITMAP, OFFSETS),
    "too many values": (NNZ + 1, 5000, BITMAP, OFFSETS),
    "more values than entries": (5001, 5000, BITMAP, OFFSETS),
    "no values": (0, 5000, BITMAP, OFFSETS),
    "too few entries": (NNZ, 4096, BITMAP, OFFSETS),
    "too many entries": (NNZ, 5120, BITMAP, OFFSETS),
    "no entries": (NNZ, 0, BITMAP, OFFSETS),
    "a short bitmap": (NNZ, 5000, BITMAP[:-8], OFFSETS),
    "an empty bitmap": (NNZ, 5000, BITMAP[:0], OFFSETS),
    "a bitmap of words": (NNZ, 5000, BITMAP.view(torch.int64), OFFSETS),
    "a bool bitmap": (NNZ, 5000, BITMAP.view(torch.bool), OFFSETS),
    "a strided bitmap": (NNZ, 5000, BITMAP.repeat_interleave(2)[::2], OFFSETS),
    "a bitmap elsewhere": (NNZ, 5000, BITMAP.to("meta"), OFFSETS),
    "short offsets": (NNZ, 5000, BITMAP, OFFSETS[:-1]),
    "no offsets": (NNZ, 5000, BITMAP, OFFSETS[:0]),
    "32-bit offsets": (NNZ, 5000, BITMAP, OFFSETS.int()),
    "strided offsets": (NNZ, 5000, BITMAP, OFFSETS.repeat_interleave(2)[::2]),
    "offsets elsewhere": (NNZ, 5000, BITMAP, OFFSETS.to("meta")),
    "offsets that end elsewhere": (NNZ, 5000, BITMAP, OFFSETS + 1),
    "offsets that start elsewhere": (NNZ, 5000, BITMAP, OFFSETS + torch.tensor([1, 0, 0])),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_raises_and_leaves_out_alone(what):
    nnz, numel, bitmap, offsets = MISFITS[what]
    for write, size, source in (
        (ops.pack_into, nnz, torch.ones(numel)),
        (ops.expand_into, numel, torch.ones(nnz)),
    ):
        whole, out = guarded(size, torch.float32)
        with pytest.raises(ValueError, match=r"pack|expand|offsets"):
            write(out, source, bitmap, offsets)
        assert (whole == 7).all()


@pytest.mark.parametrize(
    "what", [w for w in MISFITS if not {"values", "entries", "elsewhere"} & set(w.split())]
)
def test_so_do_the_operators(what):
    nnz, numel, bitmap, offsets = MISFITS[what]
    with pytest.raises((ValueError, RuntimeError)):
        ops.pack(torch.ones(numel), bitmap, offsets, nnz, None)
    with pytest.raises((ValueError, RuntimeError)):
        ops.expand(torch.ones(nnz), bitmap, offsets, [numel], None)


def test_a_bit_after_the_last_entry_raises():
    bitmap, offsets = BITMAP.clone(), OFFSETS.clone()
    bitmap[-1] = 128
    offsets[-1] += 1
    for write, size, source in (
        (ops.pack_into, NNZ + 1, torch.ones(5000)),
        (ops.expand_into, 5000, torch.ones(NNZ + 1)),
    ):
        with pytest.raises(ValueError, match="disagree"):
            write(torch.empty(size), source, bitmap, offsets)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.empty(2 * NNZ)[::2], "out must be contiguous"),
        (torch.empty(NNZ, 1), r"of shape \(\d+,\)"),
        (torch.empty(NNZ, device="meta"), "on cpu"),
        (torch.empty(0), "out must be contiguous, of shape"),
    ],
)
def test_the_public_functions_say_what_out_must_be(out, error):
    with pytest.raises(ValueError, match=error):
        pack(torch.ones(5000), PATTERN, out=out)


def test_out_may_not_overlap_what_is_read():
    memory = torch.arange(10_000.0)
    before = memory.clone()
    with pytest.raises(ValueError, match="shares memory"):
        pack(memory[:5000], PATTERN, out=memory[4000 : 4000 + NNZ])
    with pytest.raises(ValueError, match="shares memory"):
        expand(memory[4000 : 4000 + NNZ], PATTERN, out=memory[:5000])
    assert torch.equal(memory, before)
    pack(memory[:5000], PATTERN, out=memory[5000 : 5000 + NNZ])
    assert torch.equal(memory[5000 : 5000 + NNZ], before[:5000][PATTERN.to_mask()])


def test_accumulate_needs_something_to_add_to():
    with pytest.raises(ValueError, match="accumulate=True adds to out"):
        pack(torch.ones(5000), PATTERN, accumulate=True)
    total = pack(torch.ones(5000), PATTERN)
    assert (pack(torch.ones(5000), PATTERN, out=total, accumulate=True) == 2).all()


class Wrapper(Tensor):
    """Has a shape, and its memory elsewhere, as a DTensor has."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called")


def emptied(tensor: Tensor, nbytes: int = 0) -> Tensor:
    tensor.untyped_storage().resize_(nbytes)
    return tensor


WITHOUT_MEMORY = {
    "freed": emptied,
    "freed, with an offset": lambda t: emptied(torch.cat([torch.ones(9), t])[9:]),
    "shortened": lambda t: emptied(t, t.nbytes - 1),
    "a wrapper": Wrapper,
    "zeros that are not there": lambda t: torch._efficientzerotensor(t.shape),
}


@pytest.mark.parametrize("make", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
def test_tensors_without_memory_are_refused(make):
    """The C code would read and write at address 0."""
    for write, size, source_size in ((pack, NNZ, 5000), (expand, 5000, NNZ)):
        with pytest.raises(ValueError, match="has no memory of its own, or too little"):
            write(make(torch.ones(source_size)), PATTERN, out=torch.ones(size))
        with pytest.raises(ValueError, match="has no memory of its own, or too little"):
            write(torch.ones(source_size), PATTERN, out=make(torch.ones(size)))


def test_a_negated_view_is_read_with_its_sign():
    dense = torch.arange(5000.0)
    packed = pack(torch._neg_view(dense), PATTERN, out=torch.empty(NNZ))
    assert torch.equal(packed, -dense[PATTERN.to_mask()])


UNSOUND = {
    "a value in the next block": (BITMAP, OFFSETS + torch.tensor([0, 1, 0])),
    "a bit after the last entry": (
        torch.cat([BITMAP[:-1], torch.tensor([128], dtype=torch.uint8)]),
        OFFSETS,
    ),
}


@pytest.mark.parametrize("unsound", UNSOUND.values(), ids=UNSOUND)
def test_unsound_patterns_are_refused_and_autograd_hears_that_out_was_written(unsound):
    for write, size, source_size in ((ops.pack_into, NNZ, 5000), (ops.expand_into, 5000, NNZ)):
        out = torch.full((size,), 7.0)
        before = out._version
        with pytest.raises(ValueError, match="bitmap and offsets"):
            write(out, torch.ones(source_size), *unsound)
        assert out._version > before or (out == 7).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_a_pattern_holds_nothing_outside_out_is_written(data):
    """Bitmaps and offsets that disagree raise; if they agree, by luck, the result is right."""
    numel = data.draw(st.integers(0, 13_000))
    pattern = pattern_of(numel, data.draw(st.integers(0, 9)))
    bitmap, offsets = pattern.bitmap.clone(), pattern.offsets.clone()
    for _ in range(data.draw(st.integers(0, 3))):
        if numel:
            bitmap[data.draw(st.integers(0, bitmap.numel() - 1))] = data.draw(st.integers(0, 255))
    for _ in range(data.draw(st.integers(0, 2))):
        small = st.integers(-5, numel + 5)
        value = data.draw(small | st.sampled_from([-(2**63), 2**63 - 1, 2**31, 2**62]))
        offsets[data.draw(st.integers(0, offsets.numel() - 1))] = value
    nnz = pattern.nnz + data.draw(st.sampled_from([0, 0, 0, -1, 1]))
    nnz = max(nnz, 0)
    sound = (
        torch.equal(bitmap, pattern.bitmap)
        and torch.equal(offsets, pattern.offsets)
        and nnz == pattern.nnz
    )
    for write, size, source_size in (
        (ops.pack_into, nnz, numel),
        (ops.expand_into, numel, nnz),
    ):
        dtype = data.draw(st.sampled_from(DTYPES))
        source = torch.ones(source_size, dtype=data.draw(st.sampled_from(DTYPES)))
        whole, out = guarded(size, dtype)
        try:
            write(out, source, bitmap, offsets)
            assert int((out == 1).sum()) == nnz
        except (ValueError, IndexError, RuntimeError):
            assert not sound
        assert (whole[:GUARD] == 7).all()
        assert (whole[GUARD + size :] == 7).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mix_of_shapes_and_dtypes_is_right_or_refused(data):
    """As a careless caller would write: shapes, dtypes, strides and out in every combination."""
    shape = data.draw(st.sampled_from([(0,), (5,), (64,), (5, 13), (3, 4097), (70, 70)]))
    pattern = SparsityPattern(torch.rand(shape) < 0.4)
    given_shape = data.draw(st.sampled_from([shape, shape[::-1], (*shape, 1), (7,)]))
    dense = torch.ones(given_shape, dtype=data.draw(st.sampled_from(DTYPES)))
    nnz = max(0, pattern.nnz + data.draw(st.sampled_from([0, 0, -1, 1])))
    whole, out = guarded(nnz, data.draw(st.sampled_from(DTYPES)))
    fits = given_shape == shape and nnz == pattern.nnz
    try:
        pack(dense, pattern, out=out)
        assert fits
        assert (out == 1).all()
    except ValueError:
        assert not fits
        assert (whole == 7).all()
    values = torch.ones(nnz, dtype=data.draw(st.sampled_from(DTYPES)))
    whole, flat = guarded(dense.numel(), data.draw(st.sampled_from(DTYPES)))
    try:
        expand(values, pattern, out=flat.view(given_shape))
        assert fits
        assert int((flat == 1).sum()) == nnz
    except ValueError:
        assert not fits
        assert (whole == 7).all()
