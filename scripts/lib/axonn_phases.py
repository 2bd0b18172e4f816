"""The phases of a step, from its spans, which a profile shows, too.

As in Figure 8 of SAMO: *compute*, *point-to-point* (sending, and waiting for a message that is
under way), *bubble* (waiting for one that is not), *collective* (packing gradients for it, and
waiting for it), and the *optimizer*. What remains of a step is Python's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .axonn_kinds import BUBBLE, COLLECTIVE, COMPUTE, OPTIMIZER, POINT_TO_POINT

PASSES = ("axonn.forward", "axonn.loss", "axonn.backward")
SEND, WAIT, REDUCE = "axonn.send", "axonn.wait", ("reduce.compress", "reduce.all_reduce")
STEP = "optimizer"


@dataclass(frozen=True)
class Span:
    """One span of one rank, in seconds of a clock that all ranks share."""

    name: str
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


def phases(step: Sequence[Span], arriving: Mapping[str, Sequence[Span]]) -> dict[str, float]:
    """Seconds of each phase.

    Args:
        step: this rank's spans of one step.
        arriving: the sends of its neighbours in this step, in their order: "axonn.forward" those
            of the stage before, "axonn.backward" those of the stage after.
    """
    inside = [span for span in step if span.name in PASSES]
    nested = [s for s in step if s.name in (SEND, *REDUCE) and _within(s, inside)]
    found = {
        COMPUTE: _sum(inside) - _sum(nested),
        POINT_TO_POINT: _sum(span for span in step if span.name == SEND),
        BUBBLE: 0.0,
        COLLECTIVE: _sum(s for s in step if s.name == "axonn.collective")
        + _sum(s for s in nested if s.name in REDUCE),
        OPTIMIZER: _sum(s for s in step if s.name == STEP),
    }
    taken = dict.fromkeys(arriving, 0)
    for wait in (span for span in step if span.name == WAIT):
        after = (s for s in step if s.name in PASSES and s.start >= wait.end)
        kind = min(after, key=lambda s: s.start).name
        message = arriving[kind][taken[kind]]
        taken[kind] += 1
        under_way = min(max(wait.end - message.start, 0.0), wait.length)
        found[POINT_TO_POINT] += under_way
        found[BUBBLE] += wait.length - under_way
    return found


def sends(step: Sequence[Span], kind: str) -> list[Span]:
    """The messages that passes of one kind sent in a step: "axonn.forward" activations."""
    passes = [span for span in step if span.name == kind]
    return [span for span in step if span.name == SEND and _within(span, passes)]


def _within(span: Span, passes: Sequence[Span]) -> bool:
    return any(own.start <= span.start and span.end <= own.end for own in passes)


def _sum(spans: Any) -> float:
    return sum(span.length for span in spans)
