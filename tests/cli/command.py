"""Run the command line: in this process, in one of its own, or on a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparse_comm.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "sparse_comm"]


@dataclass(frozen=True)
class Done:
    """How a command ended: exit status, and what it wrote."""

    status: int
    out: str
    err: str = ""


def refused(done: Done, status: int, message: str) -> bool:
    """Whether it ended with this status and nothing but one line that says so."""
    line = done.err.removesuffix("\n")
    return (
        done.status == status
        and done.out == ""
        and "\n" not in line
        and line.startswith("sparse-comm")
        and re.search(message, line) is not None
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    """Run it in this process."""
    capsys.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    return Done(status, *capsys.readouterr())


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, with changes; None takes a variable away."""
    changes = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    merged = {**os.environ, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def start(*arguments: object, **changes: str | None) -> Done:
    """Run it in a process of its own, with changes of the environment."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**changes), capture_output=True, text=True, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr)


def heed_ctrl_c() -> None:
    """For a child: what a shell runs in the background, tests perhaps, is deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The command on a terminal: ``read_until`` waits for a text, ``finish`` for the end."""

    def __init__(self, columns: int, *arguments: object, **changes: str | None) -> None:
        variables = {"TERM": "xterm", "COLUMNS": None, "NO_COLOR": None, **changes}
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            env=environment(**variables),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=heed_ctrl_c,
        )
        os.close(theirs)
        self._ours = ours
        self._seen = b""

    def read_until(self, text: str) -> None:
        while text.encode() not in self._seen:
            assert self._read(), f"ended without {text!r}: {self._seen!r}"

    def finish(self) -> Done:
        while self._read():
            pass
        os.close(self._ours)
        text = self._seen.decode().replace("\r\n", "\n")
        return Done(self.process.wait(60), text)

    def _read(self) -> bool:
        try:
            part = os.read(self._ours, 65536)
        except OSError:  # what Linux gives at the end of a terminal
            return False
        self._seen += part
        return bool(part)
