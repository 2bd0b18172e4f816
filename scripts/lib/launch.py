"""Starts one process a rank, follows them, and leaves none behind."""

# ``python -m lib.launch MODULE WORKDIR RANK PARENT ...`` is what a rank starts as.

import ctypes
import json
import os
import queue
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent
SILENCE_LIMIT = 180  # seconds without progress after which a run counts as hung


class RankFailed(RuntimeError):
    """A rank ended with an error; the message starts with its traceback."""


# --- in the parent -------------------------------------------------------------------------------


def run_ranks(
    module: str,
    arguments: list[str],
    prefixes: list[list[str]],
    interface: str,
    workdir: Path,
    on_progress: Callable[[dict], None],
) -> list[dict]:
    """Run ``python -m module workdir rank *arguments`` once per rank; return the ranks' results.

    Args:
        module: a module of the scripts folder whose main block calls :func:`rank_main`.
        arguments: further arguments, the same for all ranks.
        prefixes: one per rank: what to put before its command (such as ``env NAME=VALUE``). It
            must exec the command: a rank ends if its parent is not this process.
        interface: the network interface for gloo.
        workdir: an empty folder for the ranks' logs, results and rendezvous.
        on_progress: called with each dict that rank 0 passed to :func:`report_progress`.

    Raises:
        RankFailed: a rank failed (the one that failed first is reported) or nothing moved for
            SILENCE_LIMIT seconds. All ranks are dead when this function returns or raises; they
            die, too, when this process is killed.
    """
    # One thread per rank: two-thread kernels slow down wildly when the cores are shared.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    processes: list[subprocess.Popen] = []
    try:
        for rank, prefix in enumerate(prefixes):
            command = [*prefix, sys.executable, "-m", "lib.launch", module, str(workdir), str(rank)]
            with open(workdir / f"rank{rank}.log", "w") as log:
                process = subprocess.Popen(
                    [*command, str(os.getpid()), *arguments],
                    cwd=SCRIPTS,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else log,
                    stderr=log,
                    text=True,
                )
            processes.append(process)
        _follow(processes, workdir, on_progress)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
    return [json.loads((workdir / f"rank{r}.json").read_text()) for r in range(len(prefixes))]


def _follow(
    processes: list[subprocess.Popen], workdir: Path, on_progress: Callable[[dict], None]
) -> None:
    """Pass rank 0's progress on until every rank has ended well."""
    lines: queue.Queue[str] = queue.Queue()

    output = processes[0].stdout
    assert output is not None  # run_ranks asked for a pipe

    def read_lines() -> None:
        for line in output:
            lines.put(line)

    threading.Thread(target=read_lines, daemon=True).start()
    last_sign_of_life = time.monotonic()
    while True:
        try:
            on_progress(json.loads(lines.get(timeout=0.1)))
            last_sign_of_life = time.monotonic()
            continue  # ends are looked at once the queue is empty
        except queue.Empty:
            pass
        codes = [process.poll() for process in processes]
        if any(codes):  # neither None (running) nor 0 (ended well)
            raise RankFailed(_first_failure(codes, workdir))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() - last_sign_of_life > SILENCE_LIMIT:
            raise RankFailed(f"no progress for {SILENCE_LIMIT} s: the ranks hang and were stopped")


def _first_failure(codes: list[int | None], workdir: Path) -> str:
    """The traceback of the rank that failed first: the others only lost their connection."""
    failures = [json.loads(path.read_text()) for path in workdir.glob("rank*.failure")]
    if failures:
        first = min(failures, key=lambda failure: failure["time"])
        text = f"{first['traceback']}\nThe traceback above is of rank {first['rank']}."
    else:
        failed = next(rank for rank, code in enumerate(codes) if code)
        text = (workdir / f"rank{failed}.log").read_text()
    ends = (_how_it_ended(rank, code, workdir) for rank, code in enumerate(codes))
    return "\n".join([text, *ends])


def _how_it_ended(rank: int, code: int | None, workdir: Path) -> str:
    if code is None:
        return f"Rank {rank} was still running and was stopped."
    if code < 0:  # by whom, only its log may know
        said = (workdir / f"rank{rank}.log").read_text()[-2000:].strip()
        text = f"Rank {rank} was killed by {signal.Signals(-code).name}"
        return f"{text}; it had said:\n{said}" if said else f"{text}."
    return f"Rank {rank} ended with status {code}."


def stop_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into the exception of Ctrl-C, so that ``finally`` clauses run."""

    def stop(number: int, frame: object) -> None:
        # A second signal must not interrupt the cleaning up that this one starts.
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


# --- in a rank -----------------------------------------------------------------------------------


def rank_main(job: Callable[[Path, int, list[str]], dict]) -> None:
    """Main function of a rank: runs ``job(workdir, rank, arguments)`` and files its result."""
    workdir, rank = Path(sys.argv[1]), int(sys.argv[2])
    try:
        result = job(workdir, rank, sys.argv[4:])
        (workdir / f"rank{rank}.json").write_text(json.dumps(result))
    except Exception:
        failure = {"rank": rank, "time": time.monotonic(), "traceback": traceback.format_exc()}
        (workdir / f"rank{rank}.failure").write_text(json.dumps(failure))
        # Not sys.exit: a process whose peer hangs may never finish its orderly exit.
        os._exit(1)
    sys.stderr.flush()
    # Nor here: torch's teardown after FSDP2 on gloo aborts in some 2 of 100 runs.
    os._exit(0)


def report_progress(**facts: object) -> None:
    """Tell the parent how far this rank is (only rank 0's words are read)."""
    print(json.dumps(facts), file=sys.__stdout__, flush=True)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL (Linux)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


if __name__ == "__main__":
    # Before the rank's module is imported: torch takes seconds, in which the parent may end, too.
    die_with(int(sys.argv[4]))
    # What libraries print, some when imported, must not mix with report_progress's lines.
    sys.stdout = sys.stderr
    del sys.argv[0]  # now as if the rank's module had been started
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
