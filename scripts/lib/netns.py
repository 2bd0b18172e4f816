"""A slow link between two processes of one machine: two network namespaces joined by a veth pair.

Needs root, iproute2 (``ip`` and ``tc``) and the kernel's tbf queue. Everything lives inside the
two namespaces, so deleting them leaves nothing behind.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

PREFIX = "sparse-comm-"
NETNS_FOLDER = Path("/run/netns")
INTERFACE = "veth"
ADDRESSES = ("10.77.0.1/30", "10.77.0.2/30")


class LinkUnavailable(RuntimeError):
    """This machine cannot make the link; the message says why."""


class NamespacePair:
    """Context manager: two namespaces whose ``veth`` interfaces are joined at ``rate``.

    ``rate`` is in ``tc``'s notation, such as "1gbit". Inside each namespace ``lo`` is up, too.
    Raises LinkUnavailable on entry if the machine cannot do it.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self.names = [f"{PREFIX}{os.getpid()}-{rank}" for rank in range(2)]

    def __enter__(self) -> "NamespacePair":
        remove_stale_namespaces()
        try:
            self._create()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def command_prefix(self, rank: int) -> list[str]:
        """What to put before a command to run it in the namespace of ``rank``."""
        return ["ip", "netns", "exec", self.names[rank]]

    def _create(self) -> None:
        if os.geteuid() != 0:
            raise LinkUnavailable("the link needs root, to create network namespaces")
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                raise LinkUnavailable(f"the link needs the command '{tool}' (package iproute2)")
        for name in self.names:
            _run("ip", "netns", "add", name)
        first, second = self.names
        peer = ["peer", "name", INTERFACE, "netns", second]
        _run("ip", "-n", first, "link", "add", INTERFACE, "type", "veth", *peer)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "address", "add", address, "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            shape = ["tbf", "rate", self.rate, "burst", "256kb", "limit", "32mb"]
            _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *shape)
            self._verify(name)

    def _verify(self, name: str) -> None:
        """Fail rather than measure an unshaped link or hang on a dead loopback."""
        if "UP" not in _run("ip", "-n", name, "link", "show", "dev", "lo").split(">")[0]:
            raise LinkUnavailable(f"'lo' stays down in network namespace {name}")
        if "tbf" not in _run("tc", "-n", name, "qdisc", "show", "dev", INTERFACE):
            raise LinkUnavailable(f"the queue of {INTERFACE} in {name} is not limited to a rate")

    def _remove(self) -> None:
        for name in self.names:
            _delete_namespace(name)


def remove_stale_namespaces() -> None:
    """Delete the namespaces that runs left behind which were killed without a chance to."""
    if os.geteuid() != 0 or not NETNS_FOLDER.is_dir():
        return
    for path in NETNS_FOLDER.iterdir():
        owner = re.fullmatch(rf"{PREFIX}(\d+)-[01]", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            _delete_namespace(path.name)


def transmitted_bytes(interface: str) -> int | None:
    """Bytes that ``interface`` of this process's namespace has sent, or None if unreadable."""
    try:
        return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())
    except OSError:
        return None


def _delete_namespace(name: str) -> None:
    if (NETNS_FOLDER / name).exists():
        subprocess.run(["ip", "netns", "delete", name], check=False)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise LinkUnavailable(f"'{' '.join(command)}' failed: {reason}")
    return done.stdout
