"""SAMO as published (Singh & Bhatele, IPDPS 2023), in torch's own operators.

Faithful: the layout of 24f + 2 bytes a parameter at density f, which is dense half-precision
weights with explicit zeros (2), an int32 index a layer (4f), half gradients (2f), fp32 gradients
(4f), an fp32 master (4f), Adam's moments (8f) and a temporary for the downcast (2f); gradients
compressed layer by layer as backward produces them, the dense ones freed at once; one collective a
layer after backward, none before, on the compressed half-precision gradients; then fp32 gradients,
Adam on compressed tensors, downcast, and expansion into the dense weights.

Not faithful: bf16 in place of fp16 with loss scaling, which CPUs lack; the optimizer is the
caller's. In its favour: the collectives are all handed over before the first is waited for, as NCCL
would queue them. ``reduce_dtype=torch.float32`` makes the collective run on the fp32 gradients.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Layer:
    """One masked parameter: its index, and what SAMO keeps compressed."""

    def __init__(self, weight: nn.Parameter, mask: Tensor) -> None:
        self.weight = weight
        self.index = mask.flatten().nonzero().flatten().int()
        self.half_gradient = weight.new_empty(self.index.numel(), requires_grad=False)
        self.master = weight.detach().flatten().index_select(0, self.index).float()
        self.master.grad = torch.empty_like(self.master)
        with torch.no_grad():
            weight.mul_(mask)

    def compress(self, gradient: Tensor) -> None:
        """Keep the unpruned entries of a dense half-precision gradient."""
        torch.index_select(gradient.view(-1), 0, self.index, out=self.half_gradient)

    def upcast(self) -> Tensor:
        """The fp32 gradient, from the half-precision one."""
        assert self.master.grad is not None
        return self.master.grad.copy_(self.half_gradient)

    def expand(self) -> None:
        """Write the master to its places in the dense weight; the zeros stay."""
        # index_copy_ demands int64; it is faster all the same than index_put_ with int32.
        half = self.master.to(self.weight.dtype)
        self.weight.detach().view(-1).index_copy_(0, self.index.long(), half)


class Samo:
    """Trains a half-precision model whose masked parameters are compressed.

    Every parameter with a mask is hooked: its gradient is compressed in ``backward()`` and freed.
    The others are the caller's to reduce and to step. One backward a step: gradients of several
    micro-batches are not added up.

    Args:
        model: its masked parameters are half-precision and contiguous; pruned entries become 0.
        masks: bool tensors by parameter name, True where unpruned.
        make_optimizer: makes the optimizer of the fp32 masters, such as ``partial(AdamW, lr=1)``.
        reduce_dtype: of the collective: None for the parameters' own, or torch.float32.

    Example::

        samo = Samo(model, masks, partial(torch.optim.AdamW, lr=1e-3, fused=True))
        loss.backward()
        samo.all_reduce()
        samo.step()
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.layers = {name: Layer(model.get_parameter(name), mask) for name, mask in masks.items()}
        self.optimizer = make_optimizer([layer.master for layer in self.layers.values()])
        self._reduce_dtype = reduce_dtype
        for layer in self.layers.values():
            layer.weight.register_post_accumulate_grad_hook(self._hook(layer))

    @staticmethod
    def _hook(layer: Layer) -> Callable[[Tensor], None]:
        def compress(parameter: Tensor) -> None:
            assert parameter.grad is not None
            layer.compress(parameter.grad)
            parameter.grad = None

        return compress

    def all_reduce(self) -> None:
        """Sum the compressed gradients over the ranks: one collective a layer."""
        works = []
        for layer in self.layers.values():
            upcast = self._reduce_dtype == torch.float32
            gradient = layer.upcast() if upcast else layer.half_gradient
            works.append(dist.all_reduce(gradient, async_op=True))
        for work in works:
            work.wait()

    def step(self) -> None:
        """Average over the ranks, step the masters, and write them into the dense weights."""
        for layer in self.layers.values():
            gradient = layer.master.grad
            if self._reduce_dtype != torch.float32:
                gradient = layer.upcast()
            assert gradient is not None
            gradient.div_(dist.get_world_size())
        self.optimizer.step()
        for layer in self.layers.values():
            layer.expand()

    def state_bytes(self) -> int:
        """Bytes that live from step to step: 24f + 2 a parameter, less the downcast's 2f."""
        tensors: list[Tensor] = []
        for layer in self.layers.values():
            assert layer.master.grad is not None
            tensors += [layer.weight, layer.index, layer.half_gradient]
            tensors += [layer.master, layer.master.grad]
            moments = self.optimizer.state[layer.master]
            tensors += [tensor for tensor in moments.values() if tensor.dim()]
        return sum(tensor.nbytes for tensor in tensors)
