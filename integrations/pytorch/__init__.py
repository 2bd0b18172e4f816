"""Plain PyTorch: DDP and FSDP2 around a compact model, and pipelines that send what is read.

DDP and FSDP2 work with ``compact`` alone. What is here adds the checks that a compact model needs
across ranks and the defaults that keep it lean.
"""

from .ddp import distributed_data_parallel
from .fsdp2 import fully_shard
from .pipelining import pack_sends

__all__ = ["distributed_data_parallel", "fully_shard", "pack_sends"]
