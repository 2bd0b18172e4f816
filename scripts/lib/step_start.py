"""What the jobs of ``bench_step.py`` share: model, masks and data, the same on every rank."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import sparse_comm

from .bench import RANKS
from .model import GPT
from .step_peers import Peer
from .text import batch, standard_library_text

CONTEXT = 256  # bytes that the model can look back
SIZE = 4  # sequences of CONTEXT bytes a step, where there is no network
HELD_OUT = 2  # batches a rank that training never sees


def new_model(job: dict) -> GPT:
    torch.manual_seed(job["seed"])
    return GPT(job["layers"], job["width"], CONTEXT)


def pruned_start(job: dict) -> tuple[GPT, dict[str, Tensor]]:
    """The warmed-up model with its pruned weights at zero, and the masks.

    Unpruned are ``job["density"]`` of all parameters: of the linear layers' matrices that is a
    little less, since all others have no mask. (Under autocast a dense model's embeddings stay in
    fp32, and those of a compact one with a ``compute_dtype`` do not.)
    """
    model = new_model(job)
    model.load_state_dict(torch.load(job["start"], weights_only=True))
    linear = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    matrices = sum(weight.numel() for weight in linear.values())
    total = sum(p.numel() for p in model.parameters())
    pruned = (1 - job["density"]) * total
    masks = sparse_comm.prune.magnitude(model, pruned / matrices, scope="global", names=linear)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model, masks


class Data:
    """Batches of the standard library's text: every rank has its own."""

    def __init__(self, job: dict, rank: int = 0) -> None:
        self._text, held_out = standard_library_text()
        self._first, self._rank = job["seed"] * 1_000_000, rank
        seeds = range(rank, HELD_OUT * RANKS, RANKS)
        self.held_out = [batch(held_out, SIZE, CONTEXT, seed) for seed in seeds]

    def batch(self, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        """``size`` sequences of ``length`` bytes; other ones in each step."""
        return batch(self._text, size, length, (self._first + step) * RANKS + self._rank)


def unpruned_entries(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """How many entries the masks leave of the dense model's parameters."""
    return sum(int(mask.sum()) for mask in masks.values()) + sum(
        parameter.numel() for name, parameter in model.named_parameters() if name not in masks
    )


def pruned_weights_left(peer: Peer, masks: Mapping[str, Tensor]) -> int:
    """How many pruned weights are not exactly zero."""
    weights = sparse_comm.dense_state_dict(peer.module)
    return sum(int(weights[name][~mask].count_nonzero()) for name, mask in masks.items())
