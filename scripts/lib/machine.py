"""What a result must say about where it comes from: machine, versions, date, commit."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from sparse_comm.kernels import describe


def provenance(command: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Facts to print beside a result. No host names and no paths: results are published."""
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {_version(name)}" for name in packages]
    return {
        "command": command,
        "machine": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib()} GiB",
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "versions": ", ".join(versions),
        "kernels": _kernels(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def _cpu_model() -> str:
    """The processor's name; on x86 with its numbers: a virtual machine's name hides them."""
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    model = facts.get("model name", platform.machine())
    if "cpu family" in facts and "model" in facts:
        model += f" (family {facts['cpu family']}, model {facts['model']})"
    return model


def _memory_gib() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _kernels() -> str:
    """Those that CPU tensors get, and why not the native ones."""
    facts = describe()
    return f"{facts['backend']}, {facts['instruction_set'] or facts['reason']}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _commit() -> str:
    """The commit of this script's repository, or "none" outside one."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        # results/ may hold what was measured a moment ago
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results")
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return f"{commit} with local changes" if changed else commit
