"""Times operations in one process in turn, so that what disturbs the machine disturbs all alike."""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from . import bench
from .bench import Estimate

SLOW_TURNS = 3  # of operations that would take most of the time

Key = TypeVar("Key", bound=Hashable)
Samples = dict[int, float]  # seconds a call, by round


@dataclass(frozen=True)
class Side:
    """One operation that is compared with others."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None  # before each turn, untimed
    calls: int = 1  # a turn
    slow: bool = False  # has a turn in few rounds


def interleave(
    sides: Mapping[Key, Side], repeats: int, on_turn: Callable[[], None]
) -> dict[Key, Samples]:
    """Let every side run once, then again, in an order that changes from round to round.

    Args:
        sides: what is compared, warmed up already.
        repeats: rounds; slow sides take part in some SLOW_TURNS of them.
        on_turn: called after each turn; there are ``turns(sides, repeats)``.

    Returns:
        Seconds a call of each side, by the number of the round.
    """
    measured: dict[Key, Samples] = {name: {} for name in sides}
    for number in range(repeats):
        for name in random.Random(number).sample(list(sides), len(sides)):
            if _has_turn(sides[name], number, repeats):
                measured[name][number] = _turn(sides[name])
                on_turn()
    return measured


def turns(sides: Mapping[Key, Side], repeats: int) -> int:
    return sum(_has_turn(side, n, repeats) for side in sides.values() for n in range(repeats))


def _has_turn(side: Side, number: int, repeats: int) -> bool:
    return not side.slow or number % max(1, repeats // SLOW_TURNS) == 0


def _turn(side: Side) -> float:
    if side.prepare is not None:
        side.prepare()
    start = time.perf_counter()
    for _ in range(side.calls):
        result = side.run()
    end = time.perf_counter()
    del result  # a new tensor is freed after the time was taken
    return (end - start) / side.calls


def calls_that_take(seconds: float, run: Callable[[], object]) -> int:
    """How many calls take about that long; at least one. Warms up as well."""
    return max(1, math.ceil(seconds / seconds_of(run)))


def seconds_of(run: Callable[[], object]) -> float:
    """The least of a few calls. Warms up as well."""
    run()
    return min(_turn(Side(run)) for _ in range(3))


def median(samples: Samples) -> Estimate:
    return bench.median(list(samples.values()))


def ratio(numerator: Samples, denominator: Samples, factor: float = 1.0) -> Estimate:
    """``factor`` times the ratio of the medians over the rounds in which both had a turn."""
    rounds = sorted(numerator.keys() & denominator.keys())
    return bench.ratio([factor * numerator[n] for n in rounds], [denominator[n] for n in rounds])
