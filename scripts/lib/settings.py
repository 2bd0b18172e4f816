"""The settings of the quickstart, passed from its command line to the ranks as JSON."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

WORLD_SIZE = 2


@dataclass(frozen=True)
class Settings:
    """Defaults are what ``scripts/quickstart.py`` runs without options."""

    layers: int = 6
    width: int = 512
    batch: int = 2  # sequences per rank and step
    context: int = 128  # bytes per sequence
    sparsity: float = 0.9
    weights: Literal["cached", "transient"] = "cached"
    warmup: int = 40  # dense steps before pruning
    steps: int = 40  # steps of each side on the loopback
    link_steps: int = 20  # steps of each side over the slow link
    seed: int = 0
    learning_rate: float = 5e-4
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Stage:
    """What one pair of processes does: train dense and compact in turn, over one interface."""

    name: str
    interface: str
    steps: int
    bucket_mb: int | None  # DDP's bucket_cap_mb, on both sides; None: each side's by the link
    reduce_dtype: str | None  # what gradients travel in, on both sides; None: fp32, as they are
    warm_up: bool  # whether this stage makes the file `start`
    start: str  # file of the dense model's weights after the warm-up
    settings: Settings

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> "Stage":
        fields = json.loads(path.read_text())
        return Stage(settings=Settings(**fields.pop("settings")), **fields)
