"""A slow link between two processes of one machine: two network namespaces joined by a veth pair.

Needs root, iproute2 (``ip`` and ``tc``), util-linux (``unshare`` and ``nsenter``) and the kernel's
tbf queue. The namespaces have no names: each lives as long as the process that holds it and those
that entered it, and the veth pair lives inside them. The holders end with the process that made
the link, however that ends, so that nothing is ever left behind.
"""

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

INTERFACE = "veth"
ADDRESSES = ("10.77.0.1/30", "10.77.0.2/30")
PACKAGES = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


class LinkUnavailable(RuntimeError):
    """This machine cannot make the link; the message says why."""


class NamespacePair:
    """Context manager: two namespaces whose ``veth`` interfaces are joined at ``rate``.

    ``rate`` is in ``tc``'s notation, such as "1gbit". Inside each namespace ``lo`` is up, too.
    Raises LinkUnavailable on entry if the machine cannot do it.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self._holders: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "NamespacePair":
        try:
            self._create()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._release()

    def command_prefix(self, rank: int) -> list[str]:
        """What to put before a command to run it in the namespace of ``rank``.

        The command then is the process that was started: its parent and its id are as without.
        """
        return ["nsenter", f"--net=/proc/{self._holders[rank].pid}/ns/net"]

    def _create(self) -> None:
        if os.geteuid() != 0:
            raise LinkUnavailable("the link needs root, to create network namespaces")
        for tool, package in PACKAGES.items():
            if shutil.which(tool) is None:
                raise LinkUnavailable(f"the link needs the command '{tool}' (package {package})")
        for _ in ADDRESSES:
            self._hold_new_namespace()
        first, second = (str(holder.pid) for holder in self._holders)
        ends = [INTERFACE, "netns", first, "type", "veth", "peer", INTERFACE, "netns", second]
        _run("ip", "link", "add", *ends)
        for rank, address in enumerate(ADDRESSES):
            inside = self.command_prefix(rank)
            _run(*inside, "ip", "address", "add", address, "dev", INTERFACE)
            _run(*inside, "ip", "link", "set", INTERFACE, "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            shape = ["tbf", "rate", self.rate, "burst", "256kb", "limit", "32mb"]
            _run(*inside, "tc", "qdisc", "add", "dev", INTERFACE, "root", *shape)
            self._verify(rank)

    def _hold_new_namespace(self) -> None:
        """Start a process in a namespace of its own that ends when this process does."""
        # It waits for the end of its input, which comes with this process's end, even by SIGKILL:
        # no other process has the pipe's other side, for Popen closes it in those it starts.
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._holders.append(holder)
        assert holder.stdout is not None and holder.stderr is not None
        if holder.stdout.readline() != "ready\n":  # it has ended
            reason = holder.stderr.read().strip() or f"exit status {holder.wait()}"
            raise LinkUnavailable(f"no network namespace can be made: {reason}")

    def _verify(self, rank: int) -> None:
        """Fail rather than measure an unshaped link or hang on a dead loopback."""
        inside = self.command_prefix(rank)
        if "UP" not in _run(*inside, "ip", "link", "show", "dev", "lo").split(">")[0]:
            raise LinkUnavailable(f"'lo' stays down in the network namespace of rank {rank}")
        if "tbf" not in _run(*inside, "tc", "qdisc", "show", "dev", INTERFACE):
            raise LinkUnavailable(f"rank {rank}'s {INTERFACE} is not limited to a rate")

    def _release(self) -> None:
        for holder in self._holders:
            holder.kill()
        for holder in self._holders:
            holder.communicate()  # waits, and closes the pipes
        self._holders.clear()


def transmitted_bytes(interface: str) -> int | None:
    """Bytes that ``interface`` of this process's namespace has sent, or None if unreadable."""
    # Not /sys/class/net: it shows the namespace that mounted it, not the one that reads it.
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])  # after eight of what was received
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise LinkUnavailable(f"'{' '.join(command)}' failed: {reason}")
    return done.stdout
