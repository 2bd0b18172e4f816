"""What the hook makes of gradients: on two ranks bit for bit, on any number the same everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sparse_comm.reduce import Reduction, reduce_hook
from tests.compact.models import (
    mlp,
    pair,
    pruned_are_zero,
    same_weights,
    seeded,
    train,
)
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import (
    SMALL,
    backward,
    compact_mlp,
    of_all_ranks,
    own_gradients,
    reduced_by_hand,
    same,
    same_on_all_ranks,
    wrapped,
)

CASES: Cases = {}
DTYPES = (torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- values


@case(CASES)
def without_a_dtype_it_is_plain_ddp_bit_for_bit(rank: int, world_size: int) -> None:
    for model in (mlp(), compact_mlp(), compact_mlp("transient")):
        for view in (True, False):
            plain = wrapped(model, None, gradient_as_bucket_view=view)
            hooked = wrapped(model, Reduction(dtype=None), gradient_as_bucket_view=view)
            for step in range(4):  # DDP rebuilds its buckets after the first
                assert same(backward(hooked, rank, step), backward(plain, rank, step))


@case(CASES)
def a_smaller_dtype_is_divided_rounded_and_added_as_by_hand(rank: int, world_size: int) -> None:
    for model in (mlp(), compact_mlp(), compact_mlp("transient")):
        for dtype in DTYPES:
            for view in (True, False):
                ddp = wrapped(model, Reduction(dtype), gradient_as_bucket_view=view)
                for step in range(3):
                    reduced = backward(ddp, rank, step)
                    assert same_on_all_ranks(reduced)
                    if world_size == 2:
                        assert same(reduced, reduced_by_hand(model, rank, dtype, step=step))
                    else:
                        every = of_all_ranks(own_gradients(model, rank, step))
                        for got, *parts in zip(reduced, *every, strict=True):
                            size = sum(part.abs() for part in parts) / world_size
                            wrong = (got - sum(parts) / world_size).abs()
                            assert (wrong <= 2**-6 * size + 1e-6).all()
                        assert not same(reduced, backward(wrapped(model, None), rank, step))


@case(CASES)
def compact_training_in_bf16_is_masked_dense_training_in_bf16(rank: int, world_size: int) -> None:
    for weights in ("cached", "transient"):
        dense, compact, masks = pair(weights=weights)
        losses = []
        for model, given in ((dense, masks), (compact, None)):
            ddp = DDP(model, gradient_as_bucket_view=True, bucket_cap_mb=SMALL)
            ddp.register_comm_hook(Reduction(), reduce_hook)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)
            losses.append(train(ddp, optimizer, given, steps=5, seed=1000 * (rank + 1)))
        if world_size == 2:
            assert losses[0] == losses[1]
            assert same_weights(dense, compact)
        else:
            assert losses[1] == pytest.approx(losses[0], rel=1e-2)
        assert pruned_are_zero(compact)
        assert same_on_all_ranks([p.detach() for p in compact.parameters()])


class Mixed(nn.Module):
    """Layers of four dtypes."""

    def __init__(self) -> None:
        super().__init__()
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        self.layers = nn.ModuleList(nn.Linear(33, 33, dtype=dtype) for dtype in dtypes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).tanh()
        return x


@case(CASES)
def each_dtype_of_a_mixed_model_travels_as_it_should(rank: int, world_size: int) -> None:
    model = seeded(Mixed)
    for dtype in (*DTYPES, torch.float32):
        reduction = Reduction(dtype, stats=True)
        ddp = wrapped(model, reduction)
        for step in range(2):
            reduced = backward(ddp, rank, step)
            assert same_on_all_ranks(reduced)

            def smaller(gradient: Tensor, dtype: torch.dtype = dtype) -> torch.dtype:
                return dtype if dtype.itemsize < gradient.dtype.itemsize else gradient.dtype

            if world_size == 2:
                assert same(reduced, reduced_by_hand(model, rank, smaller, step=step))
        name = str(dtype).removeprefix("torch.")
        wires = {bucket["dtype"] for bucket in reduction.stats()["buckets"]}
        assert wires == {name, "bfloat16", "float16"}  # halves as they are, whatever the dtype


@case(CASES)
def overflow_in_fp16_is_infinite_everywhere_and_fits_bf16(rank: int, world_size: int) -> None:
    reduced = backward(wrapped(mlp(), Reduction(torch.float16)), rank, scale=1e7)
    assert any(g is not None and g.isinf().any() for g in reduced)
    assert same_on_all_ranks(reduced)
    reduced = backward(wrapped(mlp(), Reduction(torch.bfloat16)), rank, scale=1e7)
    assert all(g is not None and g.isfinite().all() for g in reduced)
    # divided before it is rounded: what fits after the division arrives
    line = nn.Linear(1, 1, bias=False)
    line.weight.data.fill_(1.0)
    ddp = wrapped(line, Reduction(torch.float16))
    ddp(torch.full((1, 1), 65504.0 * world_size if rank == 0 else 0.0)).sum().backward()
    assert line.weight.grad is None
    assert ddp.module.weight.grad.item() == 65504.0


@case(CASES)
def one_nan_reaches_every_rank_and_no_other_entry(rank: int, world_size: int) -> None:
    for dtype in (None, *DTYPES):
        line = nn.Linear(5, 3, bias=False)
        ddp = wrapped(line, Reduction(dtype))
        x = torch.ones(1, 5)
        if rank == world_size - 1:
            x[0, 2] = torch.nan
        ddp(x).sum().backward()
        gradient = ddp.module.weight.grad
        assert gradient[:, 2].isnan().all()
        assert (gradient[:, [0, 1, 3, 4]] == 1).all()
        assert same_on_all_ranks([gradient])


@case(CASES)
def sparse_gradients_travel_as_they_are(rank: int, world_size: int) -> None:
    bag = nn.EmbeddingBag(10, 4, sparse=True, mode="sum")
    sums = []
    for reduction in (None, Reduction()):
        ddp = wrapped(bag, reduction)
        for step in range(2):
            ddp.zero_grad()
            ddp(torch.tensor([[rank, 7 + step]])).square().sum().backward()
        sums.append(ddp.module.weight.grad.to_dense())
    assert sums[0].any()
    torch.testing.assert_close(*sums, rtol=0 if world_size == 2 else 1e-6, atol=0)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(33, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).abs()


@case(CASES)
def complex_gradients_travel_as_pairs_of_real_ones(rank: int, world_size: int) -> None:
    model = seeded(Complex)
    plain, hooked = wrapped(model, None), wrapped(model, Reduction(dtype=None))
    lossy = wrapped(model, Reduction())
    for step in range(2):
        assert same(backward(hooked, rank, step), backward(plain, rank, step))
        reduced = backward(lossy, rank, step)
        assert same_on_all_ranks(reduced)
        if world_size == 2:
            parts = [
                torch.view_as_real(own) for (own,) in of_all_ranks(backward(model, rank, step))
            ]
            a, b = ((part / 2).bfloat16() for part in parts)
            assert same(reduced, [torch.view_as_complex((a + b).float())])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_hook(name, world_size):
    passed(__name__, world_size, name)
