"""DeepSpeed: compact parameters switched on by one block in its config."""

from .engine import gradient_bytes, watch
from .start import initialize

__all__ = ["gradient_bytes", "initialize", "watch"]
