"""DeepSpeed: compact parameters switched on by one block in its config."""

from .checkpoint import dense_state_dict_of, expand_checkpoint, pack_checkpoint
from .engine import gradient_bytes, watch
from .sends import pack_sends
from .start import initialize

__all__ = [
    "dense_state_dict_of",
    "expand_checkpoint",
    "gradient_bytes",
    "initialize",
    "pack_checkpoint",
    "pack_sends",
    "watch",
]
