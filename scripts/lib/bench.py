"""What benchmarks of two ranks share: links, taking turns, medians and their intervals."""

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch.distributed as dist
from scipy.stats import bootstrap

from .launch import run_ranks
from .netns import INTERFACE, LinkUnavailable, NamespacePair, transmitted_bytes
from .quickstart_stages import readable_rate

LOOPBACK = "loopback"
RANKS = 2
RESAMPLES = 2000  # of the bootstrap

Start = Callable[[], None]
Side = Callable[[Start], None]


def link_name(link: str) -> str:
    """How tables call a link that the command line calls "1gbit" or "loopback"."""
    return link if link == LOOPBACK else readable_rate(link)


# --- in the parent -------------------------------------------------------------------------------


def check_links(parser: argparse.ArgumentParser, links: Sequence[str]) -> None:
    """Refuse what the option ``--links`` does not take."""
    for link in links:
        if link != LOOPBACK and not re.fullmatch(r"[\d.]+[kmg]bit", link):
            parser.error(f"--links has {link!r}; it takes {LOOPBACK}, or a speed such as 1gbit")


def run_over(
    link: str, module: str, job: dict, on_progress: Callable[[dict], None], ranks: int = RANKS
) -> tuple[list[dict], str]:
    """Run ``module`` on ranks that ``link`` joins, with the settings ``job``.

    Args:
        link: LOOPBACK, or the rate of a link between network namespaces in ``tc``'s notation.
        module: see :func:`run_ranks`, which also says what is raised.
        job: what JSON can hold; ``read_job`` gives it to the ranks, with the name of the network
            interface to count on added as ``job["interface"]``.
        on_progress: called whenever rank 0 reports progress.
        ranks: number of them, even; the first half is on one side of the link.

    Returns:
        What the ranks returned, and in words what their counters of bytes count.

    Raises:
        LinkUnavailable: this machine cannot make such a link.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sparse-comm-")))
        if link == LOOPBACK:
            interface = "lo"
            prefixes, counted = _own_loopback(stack, ranks)
        else:
            interface = INTERFACE
            pair = stack.enter_context(NamespacePair(link))
            prefixes = [pair.command_prefix(rank * 2 // ranks) for rank in range(ranks)]
            counted = "what a rank's interface sent"
            if ranks > RANKS:
                counted = f"what an interface sent, over the {ranks // 2} ranks that share it"
        file = folder / "job.json"
        file.write_text(json.dumps(job | {"interface": interface}))
        return run_ranks(module, [str(file)], prefixes, interface, folder, on_progress), counted


def _own_loopback(stack: ExitStack, ranks: int) -> tuple[list[list[str]], str]:
    """All ranks in one namespace, if possible, whose ``lo`` no other program uses."""
    share = "half" if ranks == RANKS else f"1/{ranks}"
    whose = "both ranks'" if ranks == RANKS else "all ranks'"
    try:
        pair = stack.enter_context(NamespacePair("1gbit"))  # whose veth stays unused
    except LinkUnavailable:
        counted = f"{share} of what lo sent, which carries {whose} and other programs' bytes"
        return [[] for _ in range(ranks)], counted
    counted = f"{share} of what lo sent, which carries {whose} bytes"
    return [pair.command_prefix(0)] * ranks, counted


@dataclass(frozen=True)
class Estimate:
    """A median, or a ratio of medians, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int, scale: float = 1.0) -> str:
        value, low, high = (f"{x / scale:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} ({low}–{high})"


def median(samples: Sequence[float]) -> Estimate:
    """Median of at least two samples."""

    def statistic(a: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis)

    return _estimate((samples,), statistic)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Ratio of medians of samples that were taken in pairs, turn by turn."""

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    return _estimate((numerator, denominator), statistic)


def _estimate(data: tuple[Sequence[float], ...], statistic: Callable) -> Estimate:
    arrays = tuple(np.asarray(samples, float) for samples in data)
    interval = bootstrap(
        arrays,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    value = float(statistic(*arrays, axis=-1))
    return Estimate(value, float(interval.low), float(interval.high))


def over_ranks(turns: Sequence[Mapping], interface: str) -> dict[str, list[float]]:
    """What ``take_turns`` measured of one side on each rank, together.

    Args:
        turns: of each rank, the side's "seconds" and "bytes".
        interface: the one that was counted on.

    Returns:
        "seconds": of each turn, those of the slower rank; "bytes": sent by a rank, mean over ranks.
    """
    seconds = zip(*(turn["seconds"] for turn in turns), strict=True)
    sent = zip(*(turn["bytes"] for turn in turns), strict=True)
    share = len(turns) if interface == "lo" else 1  # of the counter
    return {
        "seconds": [max(each) for each in seconds],
        "bytes": [fmean(each) / share for each in sent],
    }


# --- in a rank -----------------------------------------------------------------------------------


def take_turns(
    sides: Mapping[str, Side], repeats: int, interface: str, on_turn: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Let every side run once, then again, so that what disturbs the machine disturbs all alike.

    Args:
        sides: what is compared, by name. Each gets a function to call once what it needs stands
            ready: there the ranks meet and its time starts. It ends when the side returns.
        repeats: turns of each side. Their order changes, or one side would always follow upon
            the same other; it is the same on all ranks.
        interface: network interface whose sent bytes are counted.
        on_turn: called with the side's name after each turn.

    Returns:
        For each side "seconds" and "bytes", one a turn; no bytes where they cannot be counted.
    """
    measured: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "bytes": []} for name in sides
    }
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(sides), len(sides)):
            seconds, sent = _turn(sides[name], interface)
            measured[name]["seconds"].append(seconds)
            if sent is not None:
                measured[name]["bytes"].append(sent)
            on_turn(name)
    return measured


def _turn(side: Side, interface: str) -> tuple[float, int | None]:
    """Seconds and sent bytes of one run of a side."""
    started: list[tuple[int | None, float]] = []

    def start() -> None:
        # Before the barrier: after it the peer may send already, and lo counts both ranks.
        sent = transmitted_bytes(interface)
        dist.barrier()
        started.append((sent, time.perf_counter()))

    side(start)
    end = time.perf_counter()
    if len(started) != 1:
        raise AssertionError(f"a side must start its time once, it did so {len(started)} times")
    dist.barrier()  # all ranks have sent what they had to send
    [(sent_before, began)] = started
    sent_after = transmitted_bytes(interface)
    if sent_before is None or sent_after is None:
        return end - began, None
    return end - began, sent_after - sent_before
