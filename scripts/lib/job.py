"""A job for ranks: its settings go to them in a file, its progress comes back as bars."""

import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import results
from .launch import RankFailed, run_ranks, stop_on_signals

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


def run_script(
    what: str,
    out: Path,
    files: str,
    measure: Callable[[Console], list],
    write: Callable[[list, dict[str, str]], None],
    is_wrong: Callable[[Any], bool],
    complaint: str,
    packages: Sequence[str] = (),
) -> int:
    """Measure rows, write them, and complain of those that miss their target.

    Returns:
        Exit status: 0, 1 if a rank failed or a row is wrong, 130 if the user stopped it.
    """
    stop_on_signals()
    console = Console()
    errors = Console(stderr=True, markup=False, highlight=False)
    origin = results.origin(packages)
    if not origin["kernels"].startswith("native"):
        text = f"Kernels: {origin['kernels']}. What compact training computes takes longer."
        console.print(text, markup=False)
    try:
        rows = measure(console)
    except RankFailed as error:
        errors.print(f"{error}\n{what} failed; everything that it started was stopped.")
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped; no process is left.")
        return 130
    write(rows, origin)
    wrong = [row for row in rows if is_wrong(row)]
    for row in wrong:
        errors.print(f"{complaint}: {row}")
    console.print(f"{len(rows) - len(wrong)} of {len(rows)} rows are as they should be.")
    console.print(f"Written: {files} in {out}")
    return 1 if wrong else 0


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
