"""Versions of packages: what is installed, what is required, and what the tests cover.

Nothing is imported to find out: a framework may take seconds, or fail.
"""

from __future__ import annotations

import re
from importlib import metadata, util

__all__ = ["BOUNDS", "TESTED", "installed", "is_tested", "requirements", "same", "within"]

# What scripts/test.sh runs with: the releases (major.minor) that scripts/constraints.txt pins, two
# where the newer one has left the oldest Python behind. A test holds the two files together.
TESTED = {
    "torch": ("2.13",),
    "numpy": ("2.4", "2.2"),
    "scipy": ("1.17", "1.15"),
    "safetensors": ("0.8",),
    "rich": ("15.0",),
    "transformers": ("5.24", "5.20"),
    "accelerate": ("1.15",),
    "peft": ("0.21",),
    "deepspeed": ("0.19",),
    "axonn": ("0.2",),
    "mpi4py": ("4.1",),
    "lightning": ("2.6",),
}

# Of frameworks whose insides are relied upon, what setup.cfg's extras require: outside of it their
# integration refuses to work.
BOUNDS = {"deepspeed": ">=0.19.8,<0.20", "axonn": ">=0.2,<0.3"}


def installed(package: str) -> str | None:
    """The version of an installed package; "" if it is there without one; None if it is not."""
    try:
        if version := metadata.version(package):
            return version
    except metadata.PackageNotFoundError:
        pass
    try:
        return "" if util.find_spec(package) is not None else None
    except (ImportError, ValueError):
        return None


def is_tested(package: str, version: str) -> bool:
    """Whether the tests run with this release of the package, whatever its bug-fix number."""
    return ".".join(version.split(".")[:2]) in TESTED.get(package, ())


def requirements(package: str) -> dict[str, str]:
    """The range of each package that ``package`` always needs, such as ">=2.11,<2.15", by name.

    Empty if the package is used without having been installed.
    """
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        name, bounds = re.fullmatch(r"([\w.-]+)\s*([^;]*)(?:;.*)?", line).groups()  # type: ignore[union-attr]
        if "extra ==" not in line:
            found[name] = bounds.strip()
    return found


def within(version: str, bounds: str) -> bool:
    """Whether a version lies in a range of ``>=`` and ``<`` bounds, which is all that ours has."""
    for bound in filter(None, bounds.split(",")):
        operator, limit = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", bound).groups()  # type: ignore[union-attr]
        if (_release(version) >= _release(limit)) != (operator == ">="):
            return False
    return True


def same(version: str, other: str) -> bool:
    """Whether two versions are one release, whatever is built for: 2.13.0 and 2.13.0+cpu are."""
    return _release(version) == _release(other)


def _release(version: str) -> tuple[int, ...]:
    """Its numbers without trailing zeros; a pre-release counts as the release."""
    numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".")]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
