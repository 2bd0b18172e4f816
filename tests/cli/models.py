"""Models for the tests of ``masks make``, saved in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn


def mixed_model() -> nn.Module:
    """fp32, bf16, fp16, one and two and four dimensions, ties, and names in no order."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "zeta": nn.Embedding(50, 12),
            "layers": nn.ModuleList(nn.Linear(12, 12) for _ in range(11)),
            "conv": nn.Conv2d(3, 5, 3),
            "norm": nn.LayerNorm(12),
            "alpha": nn.Linear(12, 40),
        }
    )
    model["zeta"].bfloat16()
    model["conv"].half()
    for layer in model["layers"][::2]:
        layer.bfloat16()
    model["codes"] = nn.ParameterList([nn.Parameter(torch.arange(9), requires_grad=False)])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(8).round_().div_(8)  # so that most entries are tied
    return model


def save(model: nn.Module, path: Path) -> Path:
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def save_sharded(model: nn.Module, folder: Path, shards: int = 3) -> Path:
    """As Hugging Face does."""
    folder.mkdir()
    state = model.state_dict()
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(state.items())[shard::shards])
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
