"""Compile what DeepSpeed would compile when the first test needs it: three kernels, for 100 s.

scripts/test.sh runs this beside the linters and the first tests. A build that was killed has left a
lock, on which DeepSpeed would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import tests.integrations.deepspeed  # noqa: F401  (which picks the accelerator)


def main() -> None:
    """Build all, or say why not: the tests that need them will fail, and say more."""
    os.setpgrp()  # to be killed together with the compiler
    os.nice(19)
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        from deepspeed.accelerator import get_accelerator

        for name in ("CPUAdam", "FusedAdam", "ShareMemComm"):
            get_accelerator().create_op_builder(f"{name}Builder").load(verbose=False)


if __name__ == "__main__":
    main()
