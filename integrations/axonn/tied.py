"""A parameter that the first and the last stage share: an embedding and the head tied to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_comm.compact.convert import patterns_of, values_changed
from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.reduce import Reduction

from .layers import layers_of
from .modules import config

if TYPE_CHECKING:
    from .start import State

__all__ = ["TiedStages"]


class TiedStages:
    """Keeps two parameters equal: same values at the start, same gradients at each step.

    Their names have been checked.

    Args:
        model: this rank's stage, compact or dense.
        there: name in the whole model by name in the stage.
        tied: name of a parameter of the first stage, name of one of the last; in the whole model.
        state: of ``init``.

    Raises:
        ValueError: on all ranks: parameters of different shapes, dtypes or masks.

    Source: the sum is that of Megatron-LM (Shoeybi et al., 2019); of values only, ours.
    """

    def __init__(
        self, model: nn.Module, there: Mapping[str, str], tied: tuple[str, str], state: State
    ) -> None:
        self.names = tied
        self._parameter = _find(model, there, tied)
        self._group = None
        self._alone = config.G_inter == 1
        if self._alone:
            return
        ranks = dist.get_process_group_ranks(state.pipeline)
        pairs = gather([ranks[0], ranks[-1]])
        mine = None
        for pair in dict.fromkeys(map(tuple, pairs)):
            group = dist.new_group(list(pair))
            if dist.get_rank() in pair:
                mine = group
        self._group = mine
        _check_alike(model, self._parameter, tied, state)
        if self._parameter is not None:
            dist.broadcast(self._parameter.data, ranks[0], group=mine)
            values_changed(model)

    def sum_gradients(self, reduction: Reduction) -> None:
        """Sum the averaged gradients of the two; a collective of the two stages."""
        if self._parameter is None or self._alone or not self._parameter.requires_grad:
            return
        if self._parameter.grad is None:
            self._parameter.grad = torch.zeros_like(self._parameter)
        gradient = self._parameter.grad
        travels = gradient.to(reduction.wire_dtype(gradient.dtype))
        dist.all_reduce(travels, group=self._group)
        gradient.copy_(travels)

    @staticmethod
    def check(model: nn.Module, there: Mapping[str, str], tied: tuple[str, str] | None) -> None:
        """Raise, on all ranks, if there are no parameters of these names. A collective."""
        on_all_ranks(lambda: tied and _find(model, there, tied))

    @staticmethod
    def with_both_masks(
        masks: Mapping[str, Any] | None, tied: tuple[str, str] | None
    ) -> Mapping[str, Any] | None:
        """Masks that have one for each of the two names, if they have one for any."""
        if masks is None or tied is None:
            return masks
        first, last = tied
        either = masks.get(first, masks.get(last))
        return masks if either is None else {first: either, last: either, **masks}


def _find(model: nn.Module, there: Mapping[str, str], tied: tuple[str, str]) -> Any:
    """This stage's parameter of the two; None if it has none, which stages between have not."""
    stage = config.inter_layer_parallel_rank
    found = {
        there[name]: parameter for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    mine = [tied[0]] * (stage == 0) + [tied[1]] * (stage == config.G_inter - 1)
    for name in mine:
        if name not in found:
            raise ValueError(
                f"tied is {tied}, but stage {stage} has no parameter {name!r}: give the name in "
                "the first stage, then that in the last"
            )
    if len(mine) == 2 and found[mine[0]] is not found[mine[1]]:
        raise ValueError(
            f"tied is {tied}, which are two parameters of one stage: tie them in the model, "
            "module.weight = other.weight"
        )
    return found[mine[0]] if mine else None


def _check_alike(model: nn.Module, parameter: Any, tied: tuple[str, str], state: State) -> None:
    """Refuse two parameters whose entries do not stand for each other. A collective."""
    mine = None if parameter is None else _described(model, parameter)
    found = gather(mine, state.pipeline)

    def check() -> None:
        if found[0] != found[-1]:
            raise ValueError(
                f"tied is {tied}, which are not alike: {_text(found[0])}, and {_text(found[-1])}"
            )

    on_all_ranks(check)


def _described(model: nn.Module, parameter: nn.Parameter) -> dict[str, Any]:
    layers = dict(layers_of(model))
    [local, *_] = (name for name, p in model.named_parameters() if p is parameter)
    layer = layers.get(local.rpartition(".")[0])
    pattern = patterns_of(model).get(local)
    return {
        "shape": tuple(parameter.shape if pattern is None else pattern.shape),
        "dtype": str(parameter.dtype),
        "masks' digest": None if pattern is None else pattern.digest(),
        "requires_grad": parameter.requires_grad,
        "cut as AxoNN's": None if layer is None else type(layer).__name__,
    }


def _text(found: dict[str, Any]) -> str:
    return ", ".join(f"{what} {value}" for what, value in found.items())
