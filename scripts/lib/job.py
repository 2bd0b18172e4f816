"""A job for ranks: its settings go to them in a file, its progress comes back as bars."""

import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .launch import run_ranks

# --- in the parent -------------------------------------------------------------------------------


def run_job(
    module: str,
    job: dict,
    ranks: int,
    on_progress: Callable[[dict], None],
    prefix: Sequence[str] = (),
) -> list[dict]:
    """Run ``module`` on every rank with the settings ``job``; return the ranks' results.

    Args:
        module: see :func:`run_ranks`, which also says what is raised.
        job: what JSON can hold; :func:`read_job` gives it to the ranks.
        ranks: number of processes, joined over the loopback.
        on_progress: called whenever rank 0 reports progress.
        prefix: what to put before the command, such as ``env NAME=VALUE``.
    """
    with tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job))
        prefixes = [list(prefix) for _ in range(ranks)]
        return run_ranks(module, [str(job_file)], prefixes, "lo", Path(folder), on_progress)


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<48}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def add_bar(progress: Progress, text: str, total: int) -> Callable[[dict], None]:
    """Add a bar; returns the function that moves it on by one."""
    task = progress.add_task(text, total=total)

    def advance(facts: dict) -> None:
        progress.advance(task)

    return advance


# --- in a rank -----------------------------------------------------------------------------------


def read_job(arguments: list[str]) -> dict:
    return json.loads(Path(arguments[0]).read_text())


def join(workdir: Path, rank: int, ranks: int) -> None:
    """Make the default process group."""
    # A file as the meeting point needs no free port.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{workdir}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=120),
    )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
