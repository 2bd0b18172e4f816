"""The package installs with a C compiler and without one, and works either way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sparse_comm.kernels import native

ROOT = Path(__file__).parent.parent
FILES = ["setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
USE = """
import warnings
import torch
import sparse_comm
from sparse_comm import SparsityPattern, kernels

pattern = SparsityPattern(torch.tensor([True, False, True]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        values = kernels.pack(torch.tensor([1.0, 2.0, 3.0]), pattern)
        assert values.tolist() == [1.0, 3.0]
        assert kernels.expand(values, pattern).tolist() == [1.0, 0.0, 3.0]
print(sparse_comm.__file__)
print(kernels.describe()["backend"])
print(*[w.message for w in caught if "native" in str(w.message)], sep="\\n")
"""


def built(folder: Path, compiler: str | None) -> Path:
    """The wheel of a copy of the project, unpacked; built with that compiler."""
    source = folder / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in ("sparse_comm", "integrations"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    environment = dict(os.environ)
    if compiler is not None:
        environment |= {"CC": compiler, "CXX": compiler, "LDSHARED": compiler}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run(
        [*command, "-w", str(folder), str(source)], env=environment, check=True, timeout=200
    )
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def output_of_use(site: Path, **extra: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(site)} | extra
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE],
        env=environment,
        cwd=site,
        capture_output=True,
        text=True,
        check=True,
    )
    path, *lines = done.stdout.strip().split("\n")
    assert Path(path).is_relative_to(site)  # not the checkout's
    return lines


def compiler() -> str | None:
    """The one that setuptools calls."""
    command = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return shutil.which(command.split()[0])


def test_without_a_compiler_it_installs_and_says_once_that_the_reference_works(
    tmp_path: Path,
) -> None:
    site = built(tmp_path, "/bin/false")
    assert not list(site.rglob("*.so"))
    backend, *warnings = output_of_use(site)
    assert backend == "reference"
    assert len(warnings) == 1
    assert "Install a C compiler" in warnings[0]
    assert output_of_use(site, SPARSE_COMM_KERNELS="reference") == ["reference"]


def test_with_a_compiler_one_binary_serves_all_pythons(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C compiler here to build with; the test above is the install without one")
    assert not native.MISSING  # with a compiler there is no excuse
    site = built(tmp_path, None)
    (binary,) = site.rglob("*.so")
    assert binary.name == "_native.abi3.so"
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    assert output_of_use(site) == ["native"]
