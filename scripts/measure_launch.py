"""Measures how long AxoNN's programs take to start and end, by torchrun and by mpirun.

Four processes, two pipeline stages x two replicas, start, train 20 steps of a small compact model
and end; then the same with a rank that fails in forward, by whom all others must end, too.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from lib import results
from lib.bench import Estimate, median
from lib.job import add_bar, progress_bars, run_script
from lib.launch import SCRIPTS, RankFailed
from lib.verdict import Verdict

RANKS, STEPS = 4, 20
FIRST, LAST = 0, RANKS - 1  # ranks that fail: one of the first stage, one of the last
TRAIN_TARGET, FAILURE_TARGET = 30.0, 10.0  # s, at most
LIMIT = 120  # s after which a run counts as hung
NAME = "launch"
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *(f"--nproc-per-node={RANKS}", "-m"),
]
MPIRUN = ["--oversubscribe", "--bind-to", "none", "-n", f"{RANKS}", sys.executable, "-m"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
BY_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that they set


@dataclass(frozen=True)
class Row:
    """What one launcher did: trained, or ended after a rank had failed."""

    launcher: str
    fails: int | None  # the rank that does
    whole: Estimate  # s, from the launcher's start to its end
    after: Estimate  # s, from the end of training, or from the failure, to the launcher's end

    @property
    def wrong(self) -> bool:
        return not self.verdict.reached

    @property
    def verdict(self) -> Verdict:
        if self.fails is None:
            text = f"{RANKS} processes start, train {STEPS} steps and end, s"
            got, most = self.whole, TRAIN_TARGET
        else:
            text = f"from the failure of rank {self.fails} in forward to the end of all, s"
            got, most = self.after, FAILURE_TARGET
        reached = got.value <= most
        return Verdict(self.launcher, text, got.text(1), f"at most {most:g}", reached)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "axonn",
        help="folder for the results (default: results/axonn of the checkout)",
    )
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; an interval needs at least 2")
    if find_spec("axonn") is None:
        parser.error("AxoNN is not installed here: run bash scripts/setup_env.sh axonn")
    notes: list[str] = []
    return run_script(
        "The measurement",
        options.out,
        f"{NAME}.md, {NAME}.json",
        measure=lambda console: run_all(options.repeats, notes, console),
        write=lambda rows, origin: write(rows, options, notes, origin),
        is_wrong=lambda row: row.wrong,
        complaint="Too slow",
        packages=("axonn", "mpi4py"),
    )


def launchers(notes: list[str]) -> dict[str, list[str]]:
    """The commands, but for what to run; a note on what this machine lacks."""
    commands = {"torchrun": TORCHRUN}
    mpirun = shutil.which("mpirun", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if mpirun and find_spec("mpi4py"):
        commands["mpirun"] = [mpirun, *MPIRUN]
    else:
        notes.append('mpirun was not measured: pip install ".[axonn,mpi]" brings it.')
    return commands


def run_all(repeats: int, notes: list[str], console: Console) -> list[Row]:
    """A row a launcher and kind of run; they take turns."""
    commands = launchers(notes)
    kinds = [(name, fails) for name in commands for fails in (None, FIRST, LAST)]
    seconds: dict = {kind: [] for kind in kinds}
    with progress_bars(console) as progress:
        on_progress = add_bar(progress, "launches", repeats * len(kinds))
        for _ in range(repeats):
            for kind in kinds:
                seconds[kind].append(run(commands[kind[0]], kind[1]))
                on_progress({})
    return [
        Row(*kind, *(median(each) for each in zip(*seconds[kind], strict=True))) for kind in kinds
    ]


def run(command: Sequence[str], fails: int | None) -> tuple[float, float]:
    """Seconds of a whole run, and of what came after its training or its failure.

    Raises:
        RankFailed: it ended as it should not, or did not end.
    """
    with tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder:
        arguments = ["lib.launched", folder, str(STEPS), *([] if fails is None else [str(fails)])]
        environment = {n: v for n, v in (os.environ | AS_ROOT).items() if n not in BY_LAUNCHER}
        began = time.time()
        with subprocess.Popen(
            [*command, *arguments],
            cwd=SCRIPTS,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                raise RankFailed(f"{command[0]} did not end within {LIMIT} s") from None
            finally:
                end = time.time()
                stop(process)
        trained = [float(path.read_text()) for path in Path(folder).glob("trained*")]
        failed = [float(path.read_text()) for path in Path(folder).glob("failed")]
    if fails is None and (process.returncode or len(trained) != RANKS):
        raise RankFailed(f"{printed}\nThis was to train; it ended with {process.returncode}.")
    if fails is not None and (not process.returncode or not failed or trained):
        raise RankFailed(f"{printed}\nThis was to fail; it ended with {process.returncode}.")
    return end - began, end - max(trained + failed)


def stop(process: subprocess.Popen) -> None:
    """End a launcher that still runs, which ends its ranks; then whatever is left of it."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


NOTES = (
    "Two pipeline stages × two replicas of a small compact model, one thread a process, all on "
    "this machine. Whole: from the start of the launcher to its end, with Python's and torch's "
    "imports. The rest: from the last step's end, or from the exception in forward, to the end of "
    "the launcher. Medians with 95 % bootstrap intervals.",
)


def write(
    rows: Sequence[Row], options: argparse.Namespace, notes: list[str], origin: dict[str, str]
) -> None:
    head = ("launcher", "run", "whole, s", "after training or failure, s")
    cells = [
        [
            row.launcher,
            f"{STEPS} steps" if row.fails is None else f"rank {row.fails} fails",
            row.whole.text(1),
            row.after.text(1),
        ]
        for row in rows
    ]
    judged = [row.verdict for row in rows]
    parts = [
        results.markdown_table(head, cells, texts=2),
        "\n".join(f"- {verdict.sentence()}" for verdict in judged),
        "\n".join(f"- {note}" for note in [*notes, *NOTES]),
    ]
    facts = {
        "settings": {"repeats": options.repeats},
        "targets": [asdict(verdict) for verdict in judged],
        "rows": [asdict(row) for row in rows],
    }
    results.write(options.out, NAME, facts, "How AxoNN's programs start and end", parts, origin)
    for verdict in judged:
        print(verdict.sentence(mark=""))


if __name__ == "__main__":
    sys.exit(main())
