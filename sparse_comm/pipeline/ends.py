"""Both ends of a stage: its modules and its boundaries, from step to step.

Every engine does the same: it describes its stages, all ranks compare the descriptions (so that
all stop if one does not fit), and each stage puts in its modules and sets its codecs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparse_comm.compact.module import compact_slots
from sparse_comm.pattern import SparsityPattern

from .agreement import Description
from .auto import choose
from .boundary import Boundary
from .channels import Channels, insert
from .codec import Codec
from .layers import OwnHook, hides_its_end
from .support import Origin, set_origin

__all__ = ["Ends"]


def _patterns(stage: nn.Module, description: Description) -> dict[str, SparsityPattern]:
    """Of the compact layers that decide which channels are sent, by parameter."""
    sides = [side for side in (description.reads, description.writes) if side is not None]
    layers = {side.layer for side in sides}
    return {
        name: slot.pattern
        for name, _, _, slot in compact_slots(stage)
        if name.rpartition(".")[0] in layers
    }


class _MarkOutput(OwnHook):
    """Says of what a stage gives that no code but torch's has seen of what it was made."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        given = output if isinstance(output, tuple) else (output,)
        for tensor in given:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                set_origin(tensor, Origin(unseen=partial(hides_its_end, module)))


class Ends:
    """A stage's modules and codecs at its boundaries, after ``compare``.

    Args:
        stage: its module, in which ``Restore`` and ``Keep`` are put, as hooks.
        description: of ``describe``.
        planned: of ``compare``.
        codec: that was asked for.
        before: this end of the boundary before the stage; None if it is the first, or if the
            framework's own messages are used.
        behind: of the boundary behind it.
        logs: whether this rank prints what ``auto`` decides.
    """

    def __init__(
        self,
        stage: nn.Module,
        description: Description,
        planned: Mapping[int, Channels | None],
        codec: str | Codec,
        before: Boundary | None,
        behind: Boundary | None,
        logs: bool = True,
    ) -> None:
        self.stage, self.description = stage, description
        self.before, self.behind = before, behind
        self.channels = planned.get(description.index - 1), planned.get(description.index)
        self._logs = logs
        self._patterns = _patterns(stage, description)
        self._marks = [] if behind is None else [stage.register_forward_hook(_MarkOutput())]
        self._handles = self._marks + insert(stage, *self.channels)
        self._undecided = {"before", "behind"} if codec == "auto" else set()

    def begin_step(self) -> None:
        """To be called before the first message of a step, on every stage.

        Raises:
            RuntimeError: masks next to a boundary are others than those that were agreed on.
        """
        self._check_masks()
        for boundary in (self.before, self.behind):
            if boundary is not None:
                boundary.forget()
        for which in ("before", "behind"):
            boundary = getattr(self, which)
            # At both ends after the first step that trained: evaluations send activations only.
            if which in self._undecided and boundary is not None and boundary.is_measured:
                self._undecided.remove(which)
                self._decide(which, boundary)

    def end_step(self) -> None:
        """Wait until what the step has sent has left."""
        for boundary in (self.before, self.behind):
            if boundary is not None:
                boundary.flush()

    def remove(self) -> None:
        """Take the modules out again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_masks(self) -> None:
        if not self._patterns:
            return
        now = _patterns(self.stage, self.description)
        if any(now.get(name) is not pattern for name, pattern in self._patterns.items()):
            raise RuntimeError(
                f"the masks next to a boundary of stage {self.description.index} have changed "
                "since its sends were planned: plan them anew, on all ranks, after update_masks"
            )

    def _decide(self, which: str, boundary: Boundary) -> None:
        """Choose; a boundary over which both ends go dense is the framework's again."""
        choice = choose(boundary, self.channels[which == "behind"])
        boundary.codec = choice.codec
        if which == "behind" and self._logs:
            print(f"sparse_comm: {choice.text}", flush=True)
        if choice.both_dense:
            boundary.flush()
            setattr(self, which, None)
            if which == "behind":
                for handle in self._marks:
                    handle.remove()
