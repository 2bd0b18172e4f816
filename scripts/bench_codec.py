"""Measures how fast the codec of zeros writes and reads tensors, in GB of dense bytes a second.

On one thread, in bf16 and fp32, beside lz4 and zlib, which users would pick, and the reference in
torch, which does the work where the native kernels are not built.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from rich.progress import track

from lib import results
from lib.pipeline_kinds import LZ4, ZLIB, codec_of
from lib.verdict import Verdict
from sparse_comm.kernels import describe, use_backend
from sparse_comm.pipeline import Codec, Zeros, decode, encode

SIZES = (1 << 16, 1 << 20, 1 << 22)  # bytes
ZERO_FRACTIONS = (0.5, 0.8, 0.95)
NATIVE, REFERENCE = "zeros", "zeros, in torch"
TARGET = 3.0  # GB/s, of messages of at least a MiB
REPEATS = 15


@dataclass(frozen=True)
class Row:
    """One codec on one kind of tensor. Medians."""

    codec: str
    dtype: str
    nbytes: int
    zeros: float
    share: float  # bytes of the message over dense
    encode: float  # dense bytes a second
    decode: float


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(1)
    origin = results.origin(("lz4",))
    if not origin["kernels"].startswith("native"):
        print(f"The native kernels are not built here: {describe()['reason']}", file=sys.stderr)
        return 1
    cases = [
        (dtype, nbytes, zeros)
        for dtype in (torch.bfloat16, torch.float32)
        for nbytes in SIZES
        for zeros in ZERO_FRACTIONS
    ]
    rows = [row for case in track(cases, "tensors") for row in measure(*case, options.repeats)]
    write(options.out, rows, origin)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes codec.md and codec.json. Takes half a minute.",
    )
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="of each (default: %(default)s)"
    )
    out = results.FOLDER / "pipeline"
    parser.add_argument(
        "--out", type=Path, default=out, help="folder for the results (default: results/pipeline)"
    )
    return parser.parse_args()


def measure(dtype: torch.dtype, nbytes: int, zeros: float, repeats: int) -> list[Row]:
    """All codecs on one tensor, in turns."""
    generator = torch.Generator().manual_seed(0)
    count = nbytes // dtype.itemsize
    live = torch.rand(count, generator=generator) >= zeros
    tensor = torch.randn(count, generator=generator).where(live, 0).to(dtype)
    codecs: dict[str, Codec] = {NATIVE: Zeros(), REFERENCE: Zeros()}
    for name in (LZ4, ZLIB):
        peer = codec_of(name)
        assert not isinstance(peer, str)
        codecs[name] = peer
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in codecs}
    shares = {}
    for repeat in range(repeats + 1):
        for name in Random(repeat).sample(list(codecs), len(codecs)):
            codec = codecs[name]
            use_backend("reference" if name == REFERENCE else None)
            writing, (message, _) = timed(lambda codec=codec: encode([tensor], codec))
            reading, ((received,), _) = timed(
                lambda message=message, codec=codec: decode(message, codec=codec)
            )
            if not torch.equal(received, tensor):
                raise AssertionError(f"{name} gives another tensor back")
            shares[name] = message.numel() / tensor.nbytes
            if repeat:  # the first touches memory
                times[name][0].append(writing)
                times[name][1].append(reading)
    use_backend(None)
    kind = str(dtype).removeprefix("torch.")
    return [
        Row(name, kind, nbytes, zeros, shares[name], *(nbytes / statistics.median(t) for t in both))
        for name, both in times.items()
    ]


def timed(function: Callable) -> tuple[float, tuple]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def write(out: Path, rows: list[Row], origin: dict[str, str]) -> None:
    judged = verdicts(rows)
    head = ("dtype", "KiB", "zeros", "codec", "bytes of dense", "encode, GB/s", "decode, GB/s")
    cells = [
        [
            row.dtype,
            f"{row.nbytes >> 10}",
            f"{row.zeros:.0%}",
            f"**{row.codec}**" if row.codec == NATIVE else row.codec,
            f"{row.share:.3f}",
            f"{row.encode / 1e9:.2f}",
            f"{row.decode / 1e9:.2f}",
        ]
        for row in rows
    ]
    parts = [
        results.markdown_table(head, cells),
        "## Targets",
        "\n".join(f"- {verdict.sentence()}" for verdict in judged),
        "## How to read it",
        "GB of the dense tensor a second, on one thread; medians of repeats in turns, whole calls: "
        "with allocating the message or the tensor, and Python's part, which is most of the time "
        "of the smallest. zlib at level 1.",
    ]
    facts = {"rows": [asdict(row) for row in rows], "targets": [asdict(one) for one in judged]}
    results.write(out, "codec", facts, "Leaving out zeros: how fast", parts, origin)
    for verdict in judged:
        print(verdict.sentence(mark=""))
    print(f"Written: codec.md and codec.json in {out}")


def verdicts(rows: list[Row]) -> list[Verdict]:
    judged = []
    for row in rows:
        if row.codec == NATIVE and row.zeros == 0.8 and row.nbytes >= 1 << 20:
            slower = min(row.encode, row.decode) / 1e9
            where = f"{row.dtype}, {row.nbytes >> 20} MiB, {row.zeros:.0%} zeros"
            text = "the slower of encoding and decoding, GB/s"
            judged.append(
                Verdict(where, text, f"{slower:.1f}", f"at least {TARGET:g}", slower >= TARGET)
            )
    return judged


if __name__ == "__main__":
    sys.exit(main())
