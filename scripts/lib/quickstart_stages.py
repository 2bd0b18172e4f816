"""The quickstart's stages: first both ranks on the loopback, then joined by a slow link."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .launch import run_ranks
from .netns import INTERFACE, LinkUnavailable, NamespacePair, remove_stale_namespaces
from .quickstart_report import SIDES, LinkResult
from .settings import WORLD_SIZE, Settings, Stage


@dataclass
class Results:
    """What the stages measured."""

    links: list[LinkResult]
    ranks: list[dict]  # as the ranks of the first stage, which warmed up, filed it
    why_no_link: str | None


def run_stages(settings: Settings, link: str, rate: str, console: Console) -> Results:
    """Run both stages, or only the first where the slow link is not wanted or impossible.

    Args:
        link: "loopback" (never a slow link), "netns" (LinkUnavailable if impossible) or "auto".
        rate: speed of the slow link in ``tc``'s notation.
    """
    remove_stale_namespaces()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quickstart-")))
        pair, why_no_link = None, "--link loopback was given"
        if link != "loopback":
            try:
                pair, why_no_link = stack.enter_context(NamespacePair(rate)), None
            except LinkUnavailable as error:
                if link == "netns":
                    raise
                why_no_link = str(error)
        if why_no_link:
            console.print(f"No run over a slow link: {why_no_link}.", markup=False)

        progress = stack.enter_context(_progress_bar(console))
        bars = {"warm-up": progress.add_task("dense warm-up", total=settings.warmup, loss="")}

        def add_bar(name: str, steps: int) -> None:
            bars[name] = progress.add_task(
                f"dense and compact, {name}", total=steps * len(SIDES), loss=""
            )

        def on_progress(event: dict) -> None:
            text = f"{event['side']} loss {event['loss']:.2f}"
            progress.update(bars[event["stage"]], advance=1, loss=text)

        def run(stage: Stage, prefixes: list[list[str]]) -> list[dict]:
            workdir = folder / stage.interface
            workdir.mkdir()
            stage_file = workdir / "stage.json"
            stage.save(stage_file)
            return run_ranks(
                "lib.quickstart_rank",
                [str(stage_file)],
                prefixes,
                stage.interface,
                workdir,
                on_progress,
            )

        start = str(folder / "warm.pt")
        loopback = Stage(settings, "loopback", "lo", settings.steps, start, warm_up=True)
        slow_name = f"{readable_rate(rate)} link"
        slow = Stage(settings, slow_name, INTERFACE, settings.link_steps, start, warm_up=False)
        add_bar(loopback.name, loopback.steps)
        if pair:
            add_bar(slow.name, slow.steps)

        # A namespace of its own gives the loopback a counter that no other program moves.
        ranks = run(loopback, [pair.command_prefix(0) if pair else []] * WORLD_SIZE)
        counted = "half of what lo sent: it carries the bytes of both ranks"
        if not pair:
            counted += ", and here those of any other program on this machine, too"
        links = [LinkResult.of(loopback.name, ranks, counted, ranks_per_counter=WORLD_SIZE)]
        if pair:
            slow_ranks = run(slow, [pair.command_prefix(rank) for rank in range(WORLD_SIZE)])
            counted = "what each rank's network interface sent, headers included"
            links.append(LinkResult.of(slow.name, slow_ranks, counted, ranks_per_counter=1))
    return Results(links, ranks, why_no_link)


def readable_rate(rate: str) -> str:
    """ "1gbit" → "1 Gbit/s"; anything else stays as it is."""
    for unit, readable in (("gbit", "Gbit/s"), ("mbit", "Mbit/s")):
        if rate.endswith(unit):
            return f"{rate.removesuffix(unit)} {readable}"
    return rate


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<35}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps {task.fields[loss]:<22}"),
        TimeRemainingColumn(),
        console=console,
    )
