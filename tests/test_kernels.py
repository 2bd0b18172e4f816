"""Pack and expand are exactly d[m] and its inverse, in every dtype, layout and transform."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.func import grad, vmap

from sparse_comm import SparsityPattern
from sparse_comm.kernels import expand, ops, pack

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REALS = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
SHAPES = [(), (0,), (3, 0), (1,), (63, 65), (2, 3, 4, 5), (3, 4097)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=70))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit: NaN payloads and the sign of zero count."""
    integer = BITS[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(integer), b.contiguous().view(integer)
    )


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every bit pattern may come: NaNs of any payload, infinities, -0.0, denormals."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = [*shape, dtype.itemsize]
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return raw.view(dtype).squeeze(-1)


def random_mask(shape: tuple[int, ...], density: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density


def case(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.3):
    mask = random_mask(shape, density)
    return random_bits(shape, dtype), mask, SparsityPattern(mask)


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_is_boolean_indexing_and_expand_its_inverse(shape, dtype):
    dense, mask, pattern = case(shape, dtype)
    values = pack(dense, pattern)
    assert same_bits(values, dense[mask])
    expected = torch.zeros_like(dense)
    expected[mask] = values
    assert same_bits(expand(values, pattern), expected)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_masks_work(density):
    dense, mask, pattern = case((5, 900), torch.float32, density)
    assert same_bits(pack(dense, pattern), dense[mask])
    expected = dense if density else torch.zeros(5, 900)
    assert same_bits(expand(dense[mask], pattern), expected)


@settings(deadline=None)
@given(masks, st.sampled_from(FLOATS), st.integers(0, 1000))
def test_pack_after_expand_is_the_identity_and_pruned_entries_are_plus_zero(array, dtype, seed):
    mask = torch.from_numpy(array)
    pattern = SparsityPattern(mask)
    values = random_bits((pattern.nnz,), dtype, seed)
    dense = expand(values, pattern)
    assert same_bits(pack(dense, pattern), values)
    assert same_bits(dense[~mask], torch.zeros(pattern.numel - pattern.nnz, dtype=dtype))


@pytest.mark.parametrize("density", [0.001, 0.5])
def test_parameters_of_many_decoding_chunks_are_whole(density):
    dense, mask, pattern = case((3, 1_000_003), torch.float32, density)
    values = pack(dense, pattern)
    assert same_bits(values, dense[mask])
    assert same_bits(pack(expand(values, pattern), pattern), values)


def test_special_values_pass_bit_for_bit():
    special = [float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-45, 3.4e38]
    nans = torch.tensor([0x7FC12345, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    dense = torch.cat([torch.tensor(special), nans])
    pattern = SparsityPattern(torch.ones(dense.shape, dtype=torch.bool))
    assert same_bits(pack(dense, pattern), dense)
    assert same_bits(expand(dense, pattern), dense)


def test_nan_and_inf_at_pruned_entries_leave_no_trace():
    dense = torch.tensor([float("nan"), 1.0, float("inf")])
    pattern = SparsityPattern(torch.tensor([False, True, False]))
    values = pack(dense, pattern)
    assert values.tolist() == [1.0]
    assert expand(values, pattern).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "layout",
    [
        lambda d: d.to(memory_format=torch.channels_last),
        lambda d: d.transpose(0, 2).contiguous().transpose(0, 2),
        lambda d: torch.stack([d, d], -1)[..., 1],
        lambda d: torch.cat([d, d], 1)[:, d.shape[1] :],
    ],
)
def test_any_memory_layout_is_read_in_row_major_order(layout):
    dense, mask, pattern = case((6, 5, 7, 9), torch.float32)
    laid_out = layout(dense)
    assert not laid_out.is_contiguous() and laid_out.shape == dense.shape
    assert same_bits(pack(laid_out, pattern), dense[mask])
    strided = torch.stack([dense[mask]] * 2, -1)[:, 0]
    assert same_bits(expand(strided, pattern), expand(dense[mask], pattern))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [1, 3])
def test_slices_at_unaligned_addresses_work_as_input_and_out(dtype, shift):
    dense, mask, pattern = case((41, 103), dtype)
    source = torch.cat([dense.new_zeros(shift), dense.flatten()])[shift:].view_as(dense)
    room = dense.new_empty(pattern.nnz + shift)
    values = pack(source, pattern, out=room[shift:])
    assert values.data_ptr() == room[shift:].data_ptr() and same_bits(values, dense[mask])
    target = dense.new_full((dense.numel() + shift,), 7)
    full = expand(values, pattern, out=target[shift:].view_as(dense))
    assert same_bits(full, expand(dense[mask], pattern))
    assert bool((target[:shift] == 7).all())


def test_out_is_filled_and_returned_and_old_content_is_gone():
    dense, mask, pattern = case((30, 40), torch.float32)
    out = torch.full((30, 40), float("nan"))
    assert expand(dense[mask], pattern, out=out) is out
    assert same_bits(out, expand(dense[mask], pattern))
    values = torch.full((pattern.nnz,), float("nan"))
    assert pack(dense, pattern, out=values) is values
    assert same_bits(values, dense[mask])


def test_out_records_no_gradient_even_for_inputs_that_need_one():
    _, _, pattern = case((4, 5), torch.float32)
    out = pack(torch.ones(4, 5, requires_grad=True), pattern, out=torch.empty(pattern.nnz))
    assert not out.requires_grad
    leaf = torch.zeros(4, 5, requires_grad=True)  # a parameter can be written to
    expand(torch.ones(pattern.nnz), pattern, out=leaf)
    assert torch.equal(leaf.detach(), pattern.to_mask().float())


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_conversion_on_the_way_rounds_to_nearest_even(wide, narrow):
    halfway = 1 + torch.finfo(narrow).eps / 2  # between 1 and the next number: down to even
    above = 1 + torch.finfo(narrow).eps * 3 / 2  # between two: up to even
    numbers = [halfway, above, -halfway, 1e-30, float("inf"), -0.0]
    dense = torch.cat([torch.tensor(numbers, dtype=wide), torch.linspace(-9, 9, 500, dtype=wide)])
    mask = random_mask(dense.shape, 0.7) | (torch.arange(506) < 6)
    pattern = SparsityPattern(mask)
    narrowed = dense.to(narrow)
    packed = pack(dense, pattern, out=torch.empty(pattern.nnz, dtype=narrow))
    assert same_bits(packed, narrowed[mask])
    eps = torch.finfo(narrow).eps
    assert packed[:3].tolist() == [1, 1 + 2 * eps, -1]
    values = pack(dense, pattern)
    assert same_bits(expand(values, pattern, dtype=narrow), narrowed.masked_fill(~mask, 0))
    widened = expand(packed, pattern, out=torch.empty(dense.shape, dtype=wide))
    assert same_bits(pack(widened, pattern), packed.to(wide))


def test_gradients_are_the_other_operation_and_do_not_leak_to_pruned_entries():
    dense, mask, pattern = case((6, 7), torch.float64)
    dense = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(pattern.nnz, dtype=torch.float64)
    (pack(dense, pattern) * weight).sum().backward()
    assert torch.equal(dense.grad, expand(weight, pattern))
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(6, 7, dtype=torch.float64)
    incoming[~mask] = float("nan")
    expand(values, pattern).backward(incoming)
    assert torch.equal(values.grad, incoming[mask])


def test_gradients_come_in_the_dtype_of_the_input():
    _, _, pattern = case((6, 7), torch.float32)
    values = torch.randn(pattern.nnz, requires_grad=True)
    expand(values, pattern, dtype=torch.bfloat16).sum().backward()
    assert values.grad.dtype == torch.float32
    assert torch.equal(values.grad, torch.ones(pattern.nnz))


@pytest.mark.parametrize("shape", [(), (0,), (4, 5), (2, 3, 2)])
def test_first_and_second_derivatives_are_right(shape):
    pattern = SparsityPattern(random_mask(shape, 0.5))
    dense = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    for function, source in ((pack, dense), (expand, values)):
        assert torch.autograd.gradcheck(lambda s, f=function: f(s, pattern), source)
        assert torch.autograd.gradgradcheck(lambda s, f=function: f(s, pattern) ** 3, source)


@pytest.mark.parametrize("shape", [(0,), (7, 11)])
def test_the_operators_pass_pytorchs_own_checks(shape):
    dense, _, pattern = case(shape, torch.float32)
    dense = torch.randn(shape, requires_grad=True)
    values = torch.randn(pattern.nnz, requires_grad=True)
    bits = (pattern.bitmap, pattern.offsets)
    torch.library.opcheck(ops.pack, (dense, *bits, pattern.nnz, None))
    torch.library.opcheck(ops.pack, (dense, *bits, pattern.nnz, torch.bfloat16))
    torch.library.opcheck(ops.expand, (values, *bits, list(shape), None))
    torch.library.opcheck(ops.expand, (values, *bits, list(shape), torch.bfloat16))


def test_the_operators_trace_as_one_graph_with_equal_results_and_gradients():
    _, _, pattern = case((8, 12), torch.float32)

    def loss(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight = expand(values, pattern)
        return (x @ weight).relu().sum() + pack(weight * 2, pattern).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        values = torch.randn(pattern.nnz, requires_grad=True)
        out = function(values, torch.randn(3, 8))
        out.backward()
        results.append((out.detach(), values.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_meta_tensors_give_shapes_without_data():
    _, _, pattern = case((8, 12), torch.float32)
    values = pack(torch.empty(8, 12, device="meta", dtype=torch.bfloat16), pattern)
    assert values.is_meta and values.shape == (pattern.nnz,) and values.dtype == torch.bfloat16
    assert expand(values, pattern).shape == (8, 12)


@pytest.mark.parametrize("batch_at", [0, 1])
def test_per_sample_gradients_equal_a_loop_of_single_ones(batch_at):
    _, _, pattern = case((4, 6), torch.float32)
    bits = (pattern.bitmap, pattern.offsets)

    def loss(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight = ops.Expand.apply(values, *bits, pattern.shape, None)
        return (weight @ x).square().sum() + ops.Pack.apply(weight, *bits, pattern.nnz, None).sum()

    values, x = torch.randn(pattern.nnz), torch.randn(3, 6)
    batched = vmap(grad(loss), in_dims=(None, batch_at))(values, x.movedim(0, batch_at))
    looped = torch.stack([grad(loss)(values, sample) for sample in x])
    torch.testing.assert_close(batched, looped)
    many = torch.randn(3, pattern.nnz)
    batched = vmap(grad(loss))(many, x)
    looped = torch.stack([grad(loss)(v, sample) for v, sample in zip(many, x, strict=True)])
    torch.testing.assert_close(batched, looped)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: pack(torch.ones(5, 4), p), r"pattern has shape \(4, 5\), the tensor \(5, 4\)"),
        (lambda p: expand(torch.ones(3), p), r"has \d+ unpruned entries.*shape \(3,\)"),
        (lambda p: expand(torch.ones(p.nnz, 1), p), "unpruned entries"),
        (
            lambda p: pack(torch.ones(4, 5), p, out=torch.empty(p.nnz + 1)),
            r"pack: out must be contiguous, of shape",
        ),
        (
            lambda p: pack(torch.ones(4, 5), p, out=torch.empty(2 * p.nnz)[::2]),
            r"got strided",
        ),
        (
            lambda p: expand(torch.ones(p.nnz), p, out=torch.empty(5, 4).T),
            r"expand: out must be contiguous.*got strided \(4, 5\)",
        ),
        (
            lambda p: expand(torch.ones(p.nnz), p, out=torch.empty(4, 5, device="meta")),
            "on cpu; got contiguous .* on meta",
        ),
        (
            lambda p: expand(torch.ones(p.nnz), p, out=torch.empty(4, 5), dtype=torch.float64),
            "dtype is torch.float64, but out has torch.float32",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_what_was_expected(call, message):
    _, _, pattern = case((4, 5), torch.float32)
    with pytest.raises(ValueError, match=message):
        call(pattern)


def test_positions_beyond_two_to_the_31_are_packed():
    size = (1 << 31) + 100
    places = [3, 1 << 31, size - 1]
    pattern = SparsityPattern.from_indices(places, (size,))
    dense = torch.tensor([7], dtype=torch.uint8).expand(size)
    assert pack(dense, pattern).tolist() == [7, 7, 7]


def test_a_cache_is_refreshed_when_its_values_changed_and_only_then():
    _, _, pattern = case((4, 5), torch.float32)
    bits = (pattern.bitmap, pattern.offsets)
    values = torch.ones(pattern.nnz)
    cache, stamp = torch.empty(4, 5), torch.full((2,), -1)
    ops.refresh(cache, values, *bits, stamp)
    assert torch.equal(cache, expand(values, pattern))
    cache.fill_(5)
    ops.refresh(cache, values, *bits, stamp)
    assert bool((cache == 5).all())  # the values had not changed
    values.mul_(3)
    ops.refresh(cache, values, *bits, stamp)
    assert torch.equal(cache, expand(values, pattern))
    other = torch.full((pattern.nnz,), 9.0)
    ops.refresh(cache, other, *bits, stamp)
    assert torch.equal(cache, expand(other, pattern))
