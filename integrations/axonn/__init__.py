"""AxoNN: pipelines, data and tensor parallelism on CPUs as on GPUs, and compact parameters."""

from .cpu import on_cpu
from .engine import InterLayerEngine
from .start import init, shutdown

__all__ = ["InterLayerEngine", "init", "on_cpu", "shutdown"]
