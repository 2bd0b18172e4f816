"""What comparisons of frameworks share: links that can be made, and the dense warm-up."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from .bench import LOOPBACK, link_name
from .job import add_bar, run_job
from .netns import LinkUnavailable, NamespacePair


def possible(links: Sequence[str], notes: list[str], console: Console) -> list[str]:
    """Those of the links that this machine can make; LinkUnavailable if it can make none."""
    found = []
    missing: LinkUnavailable | None = None
    for link in links:
        try:
            if link != LOOPBACK:
                with NamespacePair(link):
                    pass
            found.append(link)
        except LinkUnavailable as error:
            missing = error
            notes.append(f"{link_name(link)} was not measured: {error}.")
            console.print(notes[-1], markup=False)
    if missing and not found:
        raise missing
    return found


def warm_up(job: dict, progress: Progress) -> None:
    """Train the dense model a little, and file it as ``job["start"]``."""
    on_progress = add_bar(progress, "warm-up, one process", job["warm_up"])
    run_job("lib.step_one", job | {"densities": [], "computes": []}, 1, on_progress)
