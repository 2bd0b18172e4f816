"""Compile what DeepSpeed would compile when the first test needs it: three kernels, for 100 s.

scripts/test.sh runs this beside the linters and the first tests. A build that was killed has left a
lock, on which DeepSpeed would wait for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from pathlib import Path

import tests.integrations.deepspeed  # noqa: F401  (which picks the accelerator)


def main() -> None:
    """Build all, or say why not: the tests that need them will fail, and say more."""
    os.setpgrp()  # to be killed together with the compiler
    os.nice(5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # torch then takes its lock away
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    mine = (folder / "kernels.lock").open("w")
    with contextlib.suppress(BlockingIOError):  # another such run builds, and has locks
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in folder.glob("*/lock"):
            lock.unlink()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        from deepspeed.accelerator import get_accelerator

        for name in ("CPUAdam", "FusedAdam", "ShareMemComm"):
            get_accelerator().create_op_builder(f"{name}Builder").load(verbose=False)


if __name__ == "__main__":
    main()
