"""Every back-end and instruction set gives the same bits, whatever it is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from sparse_comm import SparsityPattern
from sparse_comm.kernels import describe, native, observe, ops, reference, use_backend

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NATIVE = native.instruction_sets()
# Lengths around words, blocks, pairs of groups of blocks and the groups of several threads.
LENGTHS = [0, 1, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 5, 128 * 4096, 129 * 4096 - 1]
LONG = 2 * 32 * 128 * 4096 + 77  # enough for two threads


@pytest.fixture(params=NATIVE or ["not built"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if not NATIVE:
        assert native.MISSING  # and the rest of the suite runs on the reference
        yield "none"
        return
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(NATIVE[-1])


def bits(tensor: Tensor) -> Tensor:
    return (
        tensor.clone(memory_format=torch.contiguous_format)
        .flatten()
        .view(INTEGERS[tensor.itemsize])
        if tensor.numel()
        else torch.empty(0)
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def random_bits(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Every kind of number: NaNs of all payloads, infinities, -0.0, subnormals, ties."""
    rng = np.random.default_rng(seed)
    raw = torch.from_numpy(rng.integers(0, 256, numel * dtype.itemsize, dtype=np.uint8))
    tensor = raw.view(dtype) if numel else torch.empty(0, dtype=dtype)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -6e-8, 65519.0, 65520.0, 3.3895e38]
        + [1 + k / 512 for k in range(8)],
        dtype=torch.float64,
    ).to(dtype)
    places = torch.from_numpy(rng.integers(0, max(numel, 1), numel // 3))
    which = torch.from_numpy(rng.integers(0, len(special), numel // 3))
    tensor[places] = special[which]
    return tensor


def random_pattern(numel: int, density: float, seed: int) -> SparsityPattern:
    rng = np.random.default_rng(seed)
    mask = rng.random(numel) < density
    if numel > 9000:
        mask[:4096], mask[4096:8192] = True, False  # whole blocks of one kind
    return SparsityPattern(torch.from_numpy(mask))


def check(pattern: SparsityPattern, dense: Tensor, packed_dtype: torch.dtype, seed: int) -> None:
    """Native pack, accumulate and expand against the reference."""
    arguments = (pattern.bitmap, pattern.offsets)
    outs = [torch.empty(pattern.nnz, dtype=packed_dtype) for _ in range(2)]
    old = random_bits(pattern.nnz, packed_dtype, seed + 1)
    sums = [old.clone(), old.clone()]
    values = random_bits(pattern.nnz, packed_dtype, seed + 2)
    denses = [torch.full(dense.shape, 7, dtype=dense.dtype) for _ in range(2)]
    for backend, out, total, expanded in zip(
        (native if NATIVE else reference, reference), outs, sums, denses, strict=True
    ):
        assert backend.takes(dense, out)
        backend.pack_into(out, dense, *arguments)
        backend.pack_into(total, dense, *arguments, accumulate=True)
        backend.expand_into(expanded, values, *arguments)
    assert same_bits(*outs)
    assert same_bits(*sums)
    assert same_bits(*denses)
    mask = pattern.to_mask()
    if packed_dtype == dense.dtype:
        assert same_bits(outs[0], dense[mask])
        assert same_bits(denses[0][mask], values)
    assert not bits(denses[0][~mask]).any()


@pytest.mark.parametrize("packed", FLOATS)
@pytest.mark.parametrize("dense", FLOATS)
def test_every_pair_of_dtypes(
    instruction_set: str, dense: torch.dtype, packed: torch.dtype
) -> None:
    for seed, length in enumerate(LENGTHS):
        pattern = random_pattern(length, 0.3, seed)
        check(pattern, random_bits(length, dense, seed), packed, seed)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_density(instruction_set: str, dtype: torch.dtype, density: float) -> None:
    pattern = random_pattern(20_011, density, 3)
    check(pattern, random_bits(20_011, dtype, 4), dtype, 5)


@pytest.mark.parametrize("values", [0, 1, 31, 32, 33, 63, 64, 65, 4095, 4096])
@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_blocks_with_any_number_of_values(
    instruction_set: str, dtypes: tuple[torch.dtype, torch.dtype], values: int
) -> None:
    """Conversions go by chunks of 32; the last block's values have no others behind them."""
    rng = np.random.default_rng(values)
    masks = [rng.permutation(4096) < count for count in (values, 4096 - values, 100, values)]
    pattern = SparsityPattern(torch.from_numpy(np.concatenate(masks)))
    check(pattern, random_bits(4 * 4096, dtypes[0], values), dtypes[1], values)


@settings(max_examples=60, deadline=None)
@given(
    mask=hnp.arrays(bool, st.integers(0, 9000)),
    types=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_mask(mask: np.ndarray, types: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    pattern = SparsityPattern(torch.from_numpy(mask))
    for name in NATIVE:
        native.use_instruction_set(name)
        check(pattern, random_bits(mask.size, types[0], seed), types[1], seed)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unaligned_starts(instruction_set: str, dtype: torch.dtype) -> None:
    for start in range(1, 5):
        pattern = random_pattern(9001, 0.2, start)
        whole = random_bits(9001 + start, dtype, start)
        packed = torch.empty(pattern.nnz + start, dtype=dtype)[start:]
        expanded = torch.empty(9001 + start, dtype=dtype)[start:]
        ops.pack_into(packed, whole[start:], pattern.bitmap, pattern.offsets)
        ops.expand_into(expanded, packed, pattern.bitmap, pattern.offsets)
        mask = pattern.to_mask()
        assert same_bits(packed, whole[start:][mask])
        assert same_bits(expanded[mask], packed)
        assert not bits(expanded[~mask]).any()


REALS = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool]


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_nonzeros_are_found(instruction_set: str, dtype: torch.dtype, density: float) -> None:
    for length in LENGTHS[:9]:
        for start in (0, 1, 3):
            pattern = random_pattern(length, density, length)
            whole = (torch.arange(1, length + start + 1) % 100 + 1).to(dtype)[start:]
            tensor = whole * pattern.to_mask()
            found = SparsityPattern.from_nonzeros(tensor)
            assert found == pattern
            assert torch.equal(found.offsets, pattern.offsets)
            assert found.nnz == pattern.nnz


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_makes_a_nonzero(instruction_set: str, dtype: torch.dtype) -> None:
    """-0.0, subnormals and NaNs are entries like any other."""
    width = 8 * dtype.itemsize
    raw = torch.zeros(3 * width, dtype=INTEGERS[dtype.itemsize])
    for bit in range(width):
        raw[3 * bit + 1] = 1 << bit if bit < width - 1 else -(1 << bit)
    found = SparsityPattern.from_nonzeros(raw.view(dtype))
    assert torch.equal(found.to_indices(), torch.arange(1, 3 * width, 3))


def test_nonzeros_in_any_layout_and_into_a_given_bitmap(instruction_set: str) -> None:
    tensor = torch.arange(60.0).view(3, 4, 5).permute(2, 0, 1) % 4
    bitmap = torch.full((8,), 255, dtype=torch.uint8)
    found = SparsityPattern.from_nonzeros(tensor, bitmap)
    assert found.bitmap is bitmap
    assert found == SparsityPattern(tensor != 0)
    assert found == SparsityPattern.from_bitmap(bitmap, (5, 3, 4))


def test_a_bitmap_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="has a contiguous uint8 bitmap of 8 bytes"):
        SparsityPattern.from_nonzeros(torch.ones(60), torch.zeros(16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"real numbers, got torch\.complex64 on cpu"):
        SparsityPattern.from_nonzeros(torch.ones(60, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"real numbers, got torch\.float32 on meta"):
        SparsityPattern.from_nonzeros(torch.ones(60, device="meta"))
    with pytest.raises(ValueError, match=r"is uint8 of shape \(8,\), got torch.uint8 of shape"):
        SparsityPattern.from_bitmap(torch.zeros(16, dtype=torch.uint8), (60,))
    with pytest.raises(ValueError, match="bits are set after entry 60"):
        SparsityPattern.from_bitmap(torch.full((8,), 255, dtype=torch.uint8), (60,))


def test_addresses_that_no_element_can_have_are_for_the_reference(instruction_set: str) -> None:
    """torch.frombuffer makes fp32 tensors at odd addresses."""
    pattern = random_pattern(5000, 0.2, 0)
    odd = torch.frombuffer(bytearray(4 * 5000 + 1), dtype=torch.float32, offset=1)
    odd.copy_(torch.arange(5000.0))
    assert odd.data_ptr() % 4
    out = torch.empty(pattern.nnz)
    ops.pack_into(out, odd, pattern.bitmap, pattern.offsets)
    assert torch.equal(out, odd[pattern.to_mask()])


@pytest.mark.parametrize(
    "strided",
    [
        lambda t: t.view(65, 129).t(),
        lambda t: t.view(3, 5, 13, 43).permute(0, 2, 3, 1),
        lambda t: t[::2],
        lambda t: t[:1].expand(4000),
    ],
)
def test_strided_input_is_read_in_row_major_order(instruction_set: str, strided: object) -> None:
    dense = strided(random_bits(65 * 129, torch.bfloat16, 1))
    mask = torch.from_numpy(np.random.default_rng(0).random(dense.shape) < 0.3)
    pattern = SparsityPattern(mask)
    out = torch.empty(pattern.nnz, dtype=dense.dtype)
    ops.pack_into(out, dense, pattern.bitmap, pattern.offsets)
    assert same_bits(out, dense[mask])


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_change_nothing(instruction_set: str, threads: int) -> None:
    pattern = random_pattern(LONG, 0.1, 1)
    dense = random_bits(LONG, torch.bfloat16, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(pattern, dense, torch.float32, 3)
    finally:
        torch.set_num_threads(before)


def test_large_tensors_that_bypass_the_caches(instruction_set: str) -> None:
    for dtype in FLOATS:
        numel = (16 << 20) // dtype.itemsize + 4096 + 5
        pattern = random_pattern(numel, 0.1, 1)
        values = random_bits(pattern.nnz, dtype, 2)
        expanded = torch.full((numel,), 7, dtype=dtype)
        ops.expand_into(expanded, values, pattern.bitmap, pattern.offsets)
        mask = pattern.to_mask()
        assert same_bits(expanded[mask], values)
        assert not bits(expanded[~mask]).any()


def test_torch_converts_likewise_except_for_nan() -> None:
    """So that pack and then .to() equals packing to a dtype."""
    pattern = SparsityPattern(torch.ones(20_000, dtype=torch.bool))
    for dense_type in FLOATS:
        dense = random_bits(20_000, dense_type, 1)
        for packed_type in FLOATS:
            out = torch.empty(20_000, dtype=packed_type)
            ops.pack_into(out, dense, pattern.bitmap, pattern.offsets)
            number = ~dense.isnan()
            assert same_bits(out[number], dense[number].to(packed_type))
            assert out[~number].isnan().all()


def test_the_reference_takes_what_native_does_not() -> None:
    pattern = random_pattern(5000, 0.2, 0)
    for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64):
        dense = torch.arange(5000).to(dtype)
        assert not native.takes(dense, dense)
        out = torch.empty(pattern.nnz, dtype=dtype)
        ops.pack_into(out, dense, pattern.bitmap, pattern.offsets)
        assert torch.equal(out, dense[pattern.to_mask()])


def test_a_back_end_can_be_chosen_and_describes_itself() -> None:
    try:
        use_backend("reference")
        assert describe()["backend"] == "reference"
        assert "use_backend" in describe()["reason"] or native.MISSING
    finally:
        use_backend(None)
    assert describe()["backend"] == ("native" if NATIVE else "reference")
    assert describe()["instruction_set"] == (NATIVE[-1] if NATIVE else None)
    with pytest.raises(ValueError, match="no back-end 'triton'"):
        use_backend("triton")
    with pytest.raises(ValueError, match="not on 'mmx'"):
        native.use_instruction_set("mmx")


def test_observers_hear_of_each_call_until_they_stop() -> None:
    pattern = random_pattern(5000, 0.2, 0)
    heard: list[tuple[str, float]] = []
    stop = observe(lambda name, seconds: heard.append((name, seconds)))
    out = torch.empty(pattern.nnz)
    ops.pack_into(out, torch.ones(5000), pattern.bitmap, pattern.offsets)
    ops.expand_into(torch.empty(5000), out, pattern.bitmap, pattern.offsets)
    stop()
    stop()
    ops.pack_into(out, torch.ones(5000), pattern.bitmap, pattern.offsets)
    assert [name for name, _ in heard] == ["pack", "expand"]
    assert all(seconds > 0 for _, seconds in heard)


def test_autograd_sees_that_out_was_written(instruction_set: str) -> None:
    """A saved tensor that changed must raise in backward, not give a wrong gradient."""
    pattern = random_pattern(5000, 0.2, 0)
    for write in (
        lambda out: ops.expand_into(out, torch.ones(pattern.nnz), pattern.bitmap, pattern.offsets),
        lambda out: ops.pack_into(
            out[: pattern.nnz], torch.ones(5000), pattern.bitmap, pattern.offsets
        ),
    ):
        x, saved = torch.ones(5000, requires_grad=True), torch.ones(5000)
        product = (x * saved).sum()
        write(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    with torch.inference_mode():
        out = torch.empty(5000)
        ops.expand_into(out, torch.ones(pattern.nnz), pattern.bitmap, pattern.offsets)
    assert out.sum() == pattern.nnz
