"""Plain PyTorch: DDP and FSDP2 around a compact model.

Both work with ``compact`` alone. What is here adds the checks that a compact model needs across
ranks and the defaults that keep it lean.
"""

from .ddp import distributed_data_parallel
from .fsdp2 import fully_shard

__all__ = ["distributed_data_parallel", "fully_shard"]
