"""The quickstart's stages: first both ranks on the loopback, then joined by a slow link."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .launch import run_ranks
from .netns import INTERFACE, LinkUnavailable, NamespacePair
from .quickstart_report import SIDES, StageResult
from .settings import WORLD_SIZE, Settings, Stage

# DDP's bucket size, the same for both sides of a stage. Over 1 Gbit/s the dense step was equally
# fast with 3 and 8 MB and slower with 25; of those two, 3 suits the compact side better. On the
# loopback dense was fastest with DDP's default; compact was not tried with others there.
LOOPBACK_BUCKET_MB = 25  # DDP's default
LINK_BUCKET_MB = 3


def run_stages(
    settings: Settings, link: str, rate: str, console: Console
) -> tuple[list[StageResult], str | None]:
    """Run all stages, or only the first where the slow link is not wanted or impossible.

    Args:
        settings: what to train, and how long.
        link: "loopback" (never a slow link), "netns" (LinkUnavailable if impossible) or "auto".
        rate: speed of the slow link in ``tc``'s notation.
        console: for the progress bar.

    Returns:
        The results of the stages, the loopback's first, and why there is no slow link, if so.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quickstart-")))
        pair, why_no_link = _open_link(stack, link, rate)
        start = str(folder / "warm.pt")
        loopback = Stage(
            "loopback", "lo", settings.steps, LOOPBACK_BUCKET_MB, None, True, start, settings
        )
        stages = [loopback]
        if pair:
            name = f"{readable_rate(rate)} link"
            steps = settings.link_steps
            rest = (False, start, settings)
            stages.append(Stage(name, INTERFACE, steps, LINK_BUCKET_MB, None, *rest))
            name = f"{name}, gradients in bf16"
            stages.append(Stage(name, INTERFACE, steps, None, "bfloat16", *rest))
        else:
            console.print(f"No run over a slow link: {why_no_link}.", markup=False)
        on_progress = stack.enter_context(_progress_bars(stages, console))
        return [_run(stage, pair, folder, on_progress) for stage in stages], why_no_link


def _open_link(stack: ExitStack, link: str, rate: str) -> tuple[NamespacePair | None, str | None]:
    """The slow link, closed with ``stack``, or else why there is none."""
    if link == "loopback":
        return None, "--link loopback was given"
    try:
        return stack.enter_context(NamespacePair(rate)), None
    except LinkUnavailable as error:
        if link == "netns":
            raise
        return None, str(error)


def _run(
    stage: Stage,
    pair: NamespacePair | None,
    folder: Path,
    on_progress: Callable[[dict], None],
) -> StageResult:
    """Run one stage; on the loopback both ranks share a namespace, where there are any.

    A namespace of its own gives the loopback a counter of bytes that no other program moves.
    """
    if stage.interface == INTERFACE:
        counted, ranks_per_counter = "what each rank's interface sent, headers included", 1
    else:
        counted, ranks_per_counter = "half of what lo sent, for lo carries both ranks'", WORLD_SIZE
        if pair is None:
            counted += " (and here those of any other program on this machine, too)"
    prefixes: list[list[str]] = [[]] * WORLD_SIZE
    if pair is not None:
        own = stage.interface == INTERFACE
        prefixes = [pair.command_prefix(rank if own else 0) for rank in range(WORLD_SIZE)]
    workdir = folder / stage.name.replace("/", " ")
    workdir.mkdir()
    description = workdir / "stage.json"
    stage.save(description)
    arguments = [str(description)]
    ranks = run_ranks(
        "lib.quickstart_rank", arguments, prefixes, stage.interface, workdir, on_progress
    )
    return StageResult(stage.name, ranks, counted, ranks_per_counter)


@contextmanager
def _progress_bars(stages: list[Stage], console: Console) -> Iterator[Callable[[dict], None]]:
    """A bar for the warm-up and one for each stage; gives what to call with rank 0's reports."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn("{task.completed}/{task.total} steps"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        warm_up_steps = stages[0].settings.warmup
        bars = {"warm-up": progress.add_task("dense warm-up", total=warm_up_steps, loss="")}
        for stage in stages:
            steps = stage.steps * len(SIDES)
            bars[stage.name] = progress.add_task(stage.name, total=steps, loss="")

        def on_progress(event: dict) -> None:
            loss = f"{event['side']} loss {event['loss']:.2f}"
            progress.update(bars[event["stage"]], advance=1, loss=loss)

        yield on_progress


def readable_rate(rate: str) -> str:
    """Turn "1gbit" into "1 Gbit/s"; anything else stays as it is."""
    for unit, readable in (("gbit", "Gbit/s"), ("mbit", "Mbit/s")):
        if rate.endswith(unit):
            return f"{rate.removesuffix(unit)} {readable}"
    return rate
