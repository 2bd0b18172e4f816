"""SparsityPattern holds exactly the mask, indices or matrix that it was made from."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from sparse_comm import SparsityPattern
from sparse_comm.kernels import BLOCK

SHAPES = [(), (0,), (1,), (5, 0, 3), (7,), (64,), (65,), (3, 5, 7), (2, 4096), (4097,), (3, 4095)]
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))


def random_mask(shape: tuple[int, ...], density: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_mask_comes_back_with_its_shape_and_counts(shape, density):
    mask = random_mask(shape, density)
    pattern = SparsityPattern(mask)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.shape == mask.shape and pattern.numel == mask.numel()
    assert pattern.nnz == int(mask.sum())
    assert pattern.density == (pattern.nnz / pattern.numel if pattern.numel else 1.0)


@settings(deadline=None)
@given(masks)
def test_mask_indices_and_digest_agree_for_any_mask(array):
    mask = torch.from_numpy(array)
    pattern = SparsityPattern(mask)
    indices = pattern.to_indices()
    assert torch.equal(indices, mask.flatten().nonzero().flatten())
    again = SparsityPattern.from_indices(indices, array.shape)
    assert again == pattern and again.digest() == pattern.digest() and hash(again) == hash(pattern)
    assert torch.equal(again.to_mask(), mask)


@settings(deadline=None)
@given(masks)
def test_offsets_count_the_unpruned_entries_before_each_block(array):
    pattern = SparsityPattern(torch.from_numpy(array))
    flat = array.reshape(-1)
    starts = range(0, flat.size, BLOCK)
    assert pattern.offsets.tolist() == [int(flat[:s].sum()) for s in starts] + [int(flat.sum())]


def test_offsets_hold_over_many_blocks_and_a_partial_last_one():
    mask = random_mask((5 * BLOCK + 17,))
    before = [int(mask[: i * BLOCK].sum()) for i in range(6)]
    assert SparsityPattern(mask).offsets.tolist() == [*before, int(mask.sum())]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bitmap_is_least_significant_bit_first_and_padded_with_zeros_to_64_bits(shape):
    mask = random_mask(shape)
    bitmap = SparsityPattern(mask).bitmap
    assert bitmap.dtype == torch.uint8 and bitmap.numel() == math.ceil(mask.numel() / 64) * 8
    bits = (bitmap.unsqueeze(1) >> torch.arange(8) & 1).bool().flatten()
    assert torch.equal(bits[: mask.numel()], mask.flatten())
    assert not bits[mask.numel() :].any()


def test_a_pattern_takes_an_eighth_of_a_byte_an_entry_and_eight_a_block():
    pattern = SparsityPattern(random_mask((1024, 4096)))
    assert pattern.nbytes == 1024 * 4096 / 8 + 8 * (1024 + 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda m: m.T,
        lambda m: m[::2, 1::3],
        lambda m: m.flip(0),
        lambda m: m[1:2].expand(5, m.shape[1]),
        lambda m: m[:24, :16].reshape(2, 3, 4, 16).to(memory_format=torch.channels_last),
    ],
)
def test_masks_of_any_memory_layout_are_read_in_row_major_order(view):
    mask = view(random_mask((33, 47)))
    pattern = SparsityPattern(mask)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern == SparsityPattern(mask.contiguous())


def test_later_writes_to_the_mask_do_not_reach_the_pattern():
    mask = torch.ones(10, dtype=torch.bool)
    pattern = SparsityPattern(mask)
    mask.zero_()
    assert pattern.nnz == 10 and bool(pattern.to_mask().all())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True]], "must be a torch.Tensor"),
        (np.ones(3, bool), "must be a torch.Tensor"),
        (torch.ones(3), "torch.float32; convert it with mask != 0"),
        (torch.ones(3, dtype=torch.uint8), "torch.uint8"),
        (torch.ones(3, dtype=torch.bool, device="meta"), "meta device"),
    ],
)
def test_what_is_no_bool_tensor_with_data_is_refused(mask, message):
    with pytest.raises(TypeError, match=message):
        SparsityPattern(mask)


# Digests are stored in checkpoints and mask files: these values may never change.
@pytest.mark.parametrize(
    ("mask", "digest"),
    [
        (torch.arange(30).reshape(5, 6) % 3 == 0, "c6997a0db918314b8a0afee8405352b4"),
        (torch.arange(30).reshape(6, 5) % 3 == 0, "6a6b4fb0772277fd6124f2bb89f233ce"),
        (torch.tensor(True), "fb99ed1aac83a67702c90fbb96622688"),
        (torch.zeros(0, 7, dtype=torch.bool), "f1597ff0362c775f69b00ca88266b745"),
        (torch.arange(10_000) % 7 < 2, "c5a650a91bed2bd585d3058aa7751661"),
    ],
)
def test_digests_stay_what_they_were_in_the_first_version(mask, digest):
    assert SparsityPattern(mask).digest() == digest


def test_one_bit_or_the_shape_changes_the_digest():
    mask = random_mask((64, 64))
    digest = SparsityPattern(mask).digest()
    assert SparsityPattern(mask.reshape(32, 128)).digest() != digest
    mask[63, 63] ^= True
    assert SparsityPattern(mask).digest() != digest


def test_patterns_are_equal_by_content_and_unequal_to_anything_else():
    mask = random_mask((4, 6))
    pattern = SparsityPattern(mask)
    assert pattern == SparsityPattern(mask.clone())
    assert pattern != SparsityPattern(~mask)
    assert pattern != SparsityPattern(mask.reshape(6, 4))
    assert pattern != mask.tolist()
    assert len({pattern, SparsityPattern(mask.clone()), SparsityPattern(~mask)}) == 2


def test_copies_and_pickles_are_equal_and_deepcopy_shares():
    pattern = SparsityPattern(random_mask((9, 9)))
    assert copy.deepcopy(pattern) is pattern
    assert copy.copy(pattern) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern


def test_moving_to_the_same_or_the_meta_device_gives_the_pattern_itself():
    pattern = SparsityPattern(random_mask((9,)))
    assert pattern.to("cpu") is pattern and pattern.to("meta") is pattern


def test_indices_may_come_in_any_order_container_and_integer_dtype():
    expected = SparsityPattern(torch.tensor([[True, False, True], [False, True, False]]))
    for indices in (
        [4, 0, 2],
        np.array([2, 4, 0], np.uint16),
        torch.tensor([0, 4, 2], dtype=torch.int32),
    ):
        assert SparsityPattern.from_indices(indices, (2, 3)) == expected


def test_a_shape_of_numpy_integers_gives_the_same_digest():
    shape = (np.int64(2), np.int32(3))
    pattern = SparsityPattern.from_indices([1], shape)
    assert pattern.digest() == SparsityPattern.from_indices([1], (2, 3)).digest()


@pytest.mark.parametrize(
    ("indices", "shape", "error", "message"),
    [
        ([6], (2, 3), ValueError, "index 6 is outside a parameter of 6 entries"),
        ([-1], (2, 3), ValueError, "index -1 is outside"),
        ([0], (0,), ValueError, "outside a parameter of 0 entries"),
        ([3, 1, 3], (2, 3), ValueError, "index 3 stands more than once"),
        ([], (-2,), ValueError, "no negative sizes"),
        ([0.0], (2, 3), TypeError, "must be integers, got float64"),
        ([True], (2, 3), TypeError, "must be integers, got bool"),
    ],
)
def test_indices_that_fit_no_parameter_are_refused(indices, shape, error, message):
    with pytest.raises(error, match=message):
        SparsityPattern.from_indices(indices, shape)


def test_more_than_two_to_the_31_entries_are_counted_and_placed_right():
    shape = (3, 1 << 30)
    last = math.prod(shape) - 1
    places = [0, (1 << 31) - 1, 1 << 31, (1 << 31) + 12345, last]
    pattern = SparsityPattern.from_indices(places, shape)
    assert pattern.numel == last + 1 and pattern.nnz == 5
    assert pattern.bitmap.numel() == (last + 1) // 8
    assert pattern.offsets[-2:].tolist() == [4, 5]
    assert [int(pattern.bitmap[p >> 3]) >> (p & 7) & 1 for p in places] == [1] * 5
    assert int(pattern.offsets[(1 << 31) // BLOCK]) == 2


@pytest.mark.parametrize("format", ["csr", "csc", "coo", "lil", "dok"])
@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.csr_matrix])
def test_scipy_matrices_of_every_format_give_the_mask_of_their_entries(format, make):
    mask = random_mask((12, 8), 0.2)
    pattern = SparsityPattern.from_scipy(make(mask.numpy()).asformat(format))
    assert torch.equal(pattern.to_mask(), mask)


def test_block_sparse_matrices_keep_whole_blocks():
    matrix = scipy.sparse.bsr_array((np.ones((1, 2, 2)), [1], [0, 1]), shape=(2, 4))
    expected = torch.tensor([[False, False, True, True]] * 2)
    assert torch.equal(SparsityPattern.from_scipy(matrix).to_mask(), expected)


def test_scipy_vectors_and_higher_dimensions_work():
    vector = SparsityPattern.from_scipy(scipy.sparse.coo_array(np.array([1, 0, 2])))
    assert vector.to_mask().tolist() == [True, False, True]
    mask = random_mask((3, 4, 5))
    assert torch.equal(
        SparsityPattern.from_scipy(scipy.sparse.coo_array(mask.numpy())).to_mask(), mask
    )


def test_stored_zeros_count_as_unpruned_and_duplicates_once():
    rows, columns = [0, 0, 1, 1], [1, 1, 0, 2]
    matrix = scipy.sparse.coo_array(([1.0, -1.0, 0.0, 3.0], (rows, columns)), shape=(2, 3))
    pattern = SparsityPattern.from_scipy(matrix)
    assert pattern.to_indices().tolist() == [1, 3, 5]
    assert matrix.nnz == 4  # the caller's matrix is left alone


def test_what_scipy_does_not_store_sparsely_is_refused():
    with pytest.raises(TypeError, match=r"expected a scipy.sparse matrix, got ndarray"):
        SparsityPattern.from_scipy(np.eye(3))


@settings(deadline=None)
@given(masks)
def test_a_pattern_goes_to_scipy_and_back_for_any_mask(array):
    pattern = SparsityPattern(torch.from_numpy(array))
    if array.ndim == 0:
        with pytest.raises(ValueError, match="no 0-d"):
            pattern.to_scipy()
        return
    matrix = pattern.to_scipy()
    assert matrix.shape == array.shape and matrix.format == ("csr" if array.ndim == 2 else "coo")
    assert SparsityPattern.from_scipy(matrix) == pattern


def test_values_go_to_scipy_in_row_major_order():
    mask = random_mask((6, 7))
    dense = torch.randn(6, 7, dtype=torch.float64) * mask
    matrix = SparsityPattern(mask).to_scipy(dense[mask])
    assert np.array_equal(matrix.toarray(), dense.numpy())
    with pytest.raises(ValueError, match=r"expected values of shape \(\d+,\), got \(3,\)"):
        SparsityPattern(mask).to_scipy(torch.zeros(3))


def test_n_of_m_is_told_along_any_dimension():
    mask = torch.tensor([[True, True, False, False], [False, True, False, True]]).repeat(2, 3)
    pattern = SparsityPattern(mask)
    assert pattern.is_n_m(2, 4) and not pattern.is_n_m(1, 4) and pattern.is_n_m(4, 4)
    assert pattern.is_n_m(2, 2, dim=0)
    assert not pattern.is_n_m(1, 2, dim=0)
    assert SparsityPattern(mask.T).is_n_m(2, 4, dim=0)


def test_n_of_m_needs_whole_groups_and_sensible_numbers():
    pattern = SparsityPattern(torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiple of 4 entries along dim -1, got 6"):
        pattern.is_n_m(2, 4)
    with pytest.raises(ValueError, match="0 < n <= m"):
        pattern.is_n_m(5, 4)


def test_the_repr_shows_shape_count_and_density():
    text = repr(SparsityPattern(torch.tensor([[True, False], [False, False]])))
    assert text == "SparsityPattern(shape=(2, 2), nnz=1, density=0.25, device='cpu')"
