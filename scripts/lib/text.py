"""Training text that every Python carries: its documentation and its own source code."""

import sysconfig
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

HELD_OUT_FRACTION = 0.05
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}  # folders


def standard_library_text() -> tuple[Tensor, Tensor]:
    """Return (training, held-out) bytes of the standard library, as 1-D uint8 tensors.

    The order is fixed (documentation, then sources by path), so a seed names the same batches on
    every machine with the same Python version. The held-out text is the tail: files that training
    never saw.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    parts = [topics.topics[name].encode() for name in sorted(topics.topics)]
    sources = sorted(path.relative_to(stdlib).as_posix() for path in stdlib.rglob("*.py"))
    for name in sources:
        folders = name.split("/")[:-1]
        if not LEFT_OUT & set(folders):
            parts.append((stdlib / name).read_bytes())
    text = torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)
    split = int(len(text) * (1 - HELD_OUT_FRACTION))
    return text[:split], text[split:]


def batch(text: Tensor, size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``size`` random windows: tokens and, one byte further, targets: (size, context) int64.

    The windows depend on ``seed`` alone, so two runs that ask with equal seeds see equal data.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context - 1, (size, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
