"""One rank of ``bench_sync.py``: makes gradients, then lets every peer reduce them in turn."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import sparse_comm
from sparse_comm import SparsityPattern
from sparse_comm.reduce import Link, bucket_cap_mb, measure_link

from .bench import RANKS, take_turns
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .model import GPT
from .sync_peers import Gradients, Matrices, Peer, coo, dense, packed, powersgd, samo
from .text import batch, standard_library_text

CONTEXT = 128  # bytes a sequence
SEQUENCES = 2  # of the batch whose gradients are reduced


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured of each peer, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    join(workdir, rank, RANKS)
    layers, masks = gradients_and_masks(job, rank)
    link = measure_link()
    rows = []
    sides = {}
    for kind, density, peer in make_peers(Gradients(layers), masks, link):
        for _ in range(peer.warm_up + 1):
            peer.run(dist.barrier)
        kept = masks[density] if density else None
        error = relative_error(peer.averages(), layers, kept)
        rows.append(
            {
                "kind": kind,
                "density": density,
                "collectives": peer.collectives,
                "payload": peer.payload,
                "error": error,
            }
        )
        sides[f"{kind} {density}"] = peer.run
        report_progress(peer=kind)
    turns = take_turns(
        sides, job["repeats"], job["interface"], lambda side: report_progress(peer=side)
    )
    leave()
    return {
        "entries": sum(layer.numel() for layer in layers),
        "layers": len(layers),
        "link": asdict(link),
        "peers": [row | turn for row, turn in zip(rows, turns.values(), strict=True)],
    }


def gradients_and_masks(job: dict, rank: int) -> tuple[list[Tensor], dict[float, list[Tensor]]]:
    """Gradients of a GPT's matrices, in the order of backward, and masks for each density.

    Every rank has the same model and text of its own, as in training.
    """
    torch.manual_seed(job["seed"])
    model = GPT(job["layers"], job["width"], CONTEXT)
    text, _ = standard_library_text()
    model(*batch(text, SEQUENCES, CONTEXT, seed=RANKS * job["seed"] + rank)).backward()
    matrices = {
        name: parameter
        for name, parameter in reversed(list(model.named_parameters()))
        if name.startswith("blocks.") and parameter.dim() == 2
    }
    masks = {}
    for density in job["densities"]:
        kept = sparse_comm.prune.magnitude(
            model, 1 - density, scope="layer", names=lambda name, _: name in matrices
        )
        masks[density] = [kept[name] for name in matrices]
    return [p.grad for p in matrices.values() if p.grad is not None], masks


def make_peers(
    gradients: Gradients, masks: dict[float, list[Tensor]], link: Link
) -> Iterator[tuple[str, float | None, Peer]]:
    """All that are compared: kind, density (None if dense), and the peer."""
    fp32, bf16 = gradients.fp32, gradients.bf16
    yield "dense fp32", None, dense(gradients, fp32)
    yield "dense bf16", None, dense(gradients, bf16)
    yield "PowerSGD rank 4, fp32", None, powersgd(gradients)
    weights = Matrices(gradients.shapes, torch.bfloat16)
    for density, kept in masks.items():
        yield "COO all-reduce, fp32", density, coo(gradients, kept)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield f"SAMO, {name} collective", density, samo(gradients, weights, kept, dtype)
        patterns = [SparsityPattern(mask) for mask in kept]
        for name, source in (("fp32", fp32), ("bf16", bf16)):
            travelling = sum(pattern.nnz for pattern in patterns) * source.itemsize
            bucket_mb = bucket_cap_mb(link, travelling)
            yield f"sparse_comm {name}", density, packed(gradients, source, patterns, bucket_mb)


def relative_error(
    averages: list[Tensor], layers: list[Tensor], masks: list[Tensor] | None
) -> float:
    """Norm of (averages − exact averages) over that of the exact ones, of unpruned entries."""
    wrong = total = 0.0
    for index, (got, gradient) in enumerate(zip(averages, layers, strict=True)):
        exact = gradient.double()
        dist.all_reduce(exact)
        exact /= RANKS
        if masks is not None:
            exact = exact[masks[index]]
        wrong += float((got.double() - exact).square().sum())
        total += float(exact.square().sum())
    return math.sqrt(wrong / total)


if __name__ == "__main__":
    rank_main(main)
