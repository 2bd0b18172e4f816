"""The codec of channels that nobody reads, or that are always zero: they are not sent.

A pair of modules does it, ``Keep`` at the end of one stage and ``Restore`` at the beginning of the
next: sizes are known beforehand, so no framework notices. Gradients of the channels left out are
zero on one side, and not looked at on the other: they are not sent either.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import READERS, OwnHook, Side, layers_of, read_channels, written_channels
from .support import pass_origin

__all__ = ["Channels", "Keep", "Restore", "insert", "plan_channels", "sides_of"]


@dataclass(frozen=True)
class Channels:
    """The channels of a boundary that are sent.

    Attributes:
        dim: that of the channels.
        kept: their numbers, ascending: int64, 1-D.
        unread: 1-D, bool, by channel: whether the next stage never reads it.
        why: for the log.
    """

    dim: int
    kept: Tensor
    unread: Tensor
    why: str

    @property
    def count(self) -> int:
        """Of all channels."""
        return self.unread.numel()

    @property
    def density(self) -> float:
        """Fraction of the channels that is sent."""
        return self.kept.numel() / max(self.count, 1)


class Keep(nn.Module):
    """Leaves out channels: at the end of a stage.

    The gradient of what is left out is zero.
    """

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with its kept channels only."""
        channels = self.channels
        _check(x, channels.dim, channels.count, "the stage gives")
        return x.index_select(channels.dim, channels.kept.to(x.device))


class Restore(nn.Module):
    """Puts back what ``Keep`` left out: at the beginning of the next stage.

    Its gradient is that of the kept channels.
    """

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with all channels."""
        channels = self.channels
        _check(x, channels.dim, channels.kept.numel(), "the message has")
        shape = list(x.shape)
        shape[channels.dim] = channels.count
        return x.new_zeros(shape).index_copy(channels.dim, channels.kept.to(x.device), x)


def _check(x: Tensor, dim: int, count: int, what: str) -> None:
    if x.ndim < 2 or x.shape[dim] != count:
        raise ValueError(
            f"{what} a tensor of shape {tuple(x.shape)}, expected {count} channels in dimension "
            f"{dim}: a stage that leaves out channels is called by its pipeline only, with what "
            "the stage before sends; a copy.deepcopy of it takes and gives all"
        )


def plan_channels(writer: Side | None, reader: Side | None) -> Channels | None:
    """The channels that a boundary needs; None if that is all of them, or is not known.

    Args:
        writer: ``written_channels`` of the stage before it.
        reader: ``read_channels`` of the stage after it.

    Source: ours.
    """
    if writer is None and reader is None:
        return None
    dim = writer.dim if writer is not None else reader.dim  # type: ignore[union-attr]
    needed: list[Tensor] = []
    reasons = []
    each = 1
    if writer is not None and reader is not None:
        each = _features_of_each(writer, reader)
        if each == 0:  # the stages see different dimensions as channels
            return None
    if writer is not None:
        needed.append(writer.needed.repeat_interleave(each if writer.flat else 1))
        reasons.append(f"{writer.layer!r} writes {_of(needed[-1])}")
    if reader is not None:
        if reader.flat and writer is None:
            return None  # how many features are a channel is not known
        mine = reader.needed.reshape(-1, each).any(1) if reader.flat else reader.needed
        needed.append(mine)
        reasons.append(f"{reader.layer!r} reads {_of(mine)}")
    sent = torch.stack(needed).all(0)
    if sent.all():
        return None
    kept = sent.nonzero().flatten()
    if kept.numel() == 0:
        kept = torch.zeros(1, dtype=torch.int64)  # no framework sends empty tensors
    unread = torch.zeros_like(sent) if reader is None else ~needed[-1]
    return Channels(dim, kept, unread, " and ".join(reasons))


def _features_of_each(writer: Side, reader: Side) -> int:
    """Features that flattening makes of a channel; 1 without, 0 if the sides do not fit."""
    if not writer.flat and not reader.flat:
        fits = writer.dim == reader.dim and writer.needed.numel() == reader.needed.numel()
        return int(fits)
    if (writer.flat and reader.dim != -1) or (reader.flat and writer.dim != 1):
        return 0
    each, rest = divmod(reader.needed.numel(), writer.needed.numel())
    return 0 if rest else each


def _of(needed: Tensor) -> str:
    return f"{int(needed.sum())} of {needed.numel()} channels"


def insert(
    stage: nn.Module, first: Channels | None = None, last: Channels | None = None
) -> list[Any]:
    """Put ``Restore`` before a stage and ``Keep`` behind it, as hooks: its names stay.

    With the first micro-batch they look whether what is left out is what the masks promise.

    Returns:
        Handles, whose ``remove()`` takes them out again.
    """
    handles = []
    if first is not None:
        handles.append(stage.register_forward_pre_hook(_Before(Restore(first)), prepend=True))
    if last is not None:
        handles.append(stage.register_forward_hook(_Behind(Keep(last))))
    return handles


class _Before(OwnHook):
    def __init__(self, module: Restore) -> None:
        self.module = module
        self._probed: set[bool] = set()  # in training, in evaluation

    def __call__(self, stage: nn.Module, args: Any, output: Any = None) -> Any:
        given = args[0] if isinstance(args[0], tuple) else args  # DeepSpeed gives a tuple
        if stage.training not in self._probed and bool(given[0].isfinite().all()):
            self._probed.add(stage.training)
            probe_reader(stage, self.module, given[0].detach())
        restored = (self.module(given[0]), *given[1:])
        return restored if given is args else (restored, *args[1:])


class _Behind(OwnHook):
    def __init__(self, module: Keep) -> None:
        self.module = module
        self._probed: set[bool] = set()

    def __call__(self, stage: nn.Module, args: Any, output: Any = None) -> Any:
        several = isinstance(output, tuple)
        first = output[0] if several else output
        if stage.training not in self._probed and bool(first.isfinite().all()):
            self._probed.add(stage.training)
            probe_writer(self.module.channels, first.detach())
        kept = self.module(first)
        pass_origin(kept, first)
        return (kept, *output[1:]) if several else kept


def probe_writer(channels: Channels, output: Tensor) -> None:
    """Check that what a stage writes to the channels left out is what the next one puts there.

    Raises:
        RuntimeError: it is not: weights that the masks prune are not zero, say.
    """
    dropped = torch.ones(channels.count, dtype=torch.bool)
    dropped[channels.kept] = False
    left_out = (dropped & ~channels.unread).nonzero().flatten()
    if bool(output.index_select(channels.dim, left_out.to(output.device)).any()):
        raise RuntimeError(
            "a stage writes to channels that its masks make zero: the weights and biases that "
            f"they prune must be zero ({channels.why})"
        )


def probe_reader(stage: nn.Module, restore: Restore, sent: Tensor) -> None:
    """Check that what stands in channels that are not read changes nothing, in neither pass.

    On copies of the layers up to the one that reads, and compared bit for bit.

    Raises:
        RuntimeError: it does: weights that the masks prune are not zero, say.
    """
    channels = restore.channels
    if not channels.unread.any():
        return
    results = [_passes(stage, restore, sent, noise) for noise in (False, True)]
    for plain, noisy in zip(*results, strict=True):
        if not torch.equal(plain, noisy):
            raise RuntimeError(
                "a stage reads channels that its masks prune: the weights that they prune must be "
                f"zero ({channels.why})"
            )


def _passes(stage: nn.Module, restore: Restore, sent: Tensor, noise: bool) -> list[Tensor]:
    """Output and gradients of the layers up to the one that reads the boundary."""
    channels = restore.channels
    head = nn.Sequential(*_head(stage))
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        x = sent.clone().requires_grad_()
        whole = restore(x)
        if noise:
            unread = channels.unread.nonzero().flatten().to(x.device)
            random = torch.randn_like(whole.index_select(channels.dim, unread))
            whole = whole.index_copy(channels.dim, unread, random)
        torch.manual_seed(1)  # of dropout
        y = head(whole)
        torch.manual_seed(2)
        y.backward(torch.randn_like(y))
    assert x.grad is not None
    return [y.detach(), x.grad]


def _head(stage: nn.Module) -> list[nn.Module]:
    """Copies of those layers, without hooks: the stage may be such a layer itself."""
    head: list[nn.Module] = []
    for _, layer in layers_of(stage):
        head.append(copy.deepcopy(layer))
        head[-1]._forward_pre_hooks.clear()
        head[-1]._forward_hooks.clear()
        if isinstance(layer, READERS):
            break
    return head


def sides_of(stage: nn.Module, masks: Mapping[str, Tensor]) -> tuple[Side | None, Side | None]:
    """What a stage reads of the boundary before it, and writes to the one behind it."""
    layers = list(layers_of(stage))
    return read_channels(layers, masks), written_channels(layers, masks)
