"""A benchmark that is stopped or killed leaves no process and no network namespace behind.

A namespace without a name lives as long as a process is in it, and so do the interfaces within.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.lib.netns import INTERFACE, LinkUnavailable, NamespacePair
from tests.links import links_possible

SCRIPTS = Path(__file__).parent.parent / "scripts"
PATIENCE = 120  # seconds that a busy machine may take
MARK = "SPARSE_COMM_TEST_MARK"


class Marked:
    """A program that was started with a mark in its environment, and all that it started."""

    def __init__(self, *command: str, tmp_path: Path) -> None:
        self.mark = f"{MARK}={uuid.uuid4()}".encode()
        name, _, value = self.mark.decode().partition("=")
        # Its files go where pytest clears up: no process can remove its own after SIGKILL.
        environment = os.environ | {name: value, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=SCRIPTS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def living(self) -> dict[int, str]:
        """Command lines of its processes, wherever their parents are; zombies do not count."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    found[int(folder.name)] = b" ".join(words).decode()
            except OSError:  # ended meanwhile, or another user's
                continue
        return found

    def ranks(self) -> list[int]:
        return [pid for pid, command in self.living().items() if "-m lib.launch" in command]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"not {what}; alive: {self.living()}"
            time.sleep(0.02)

    def end(self) -> str:
        """Kill what is alive; returns what was printed since, once."""
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
        assert self.process.stdout is not None
        printed = b"" if self.process.stdout.closed else self.process.communicate()[0]
        return printed.decode()


def namespace(pid: int | str) -> int | None:
    """Number of the network namespace that a process is in; None if it has ended."""
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


def made_namespaces(program: Marked) -> set[int]:
    """Namespaces of the program's own, checked to have nothing else that keeps them alive.

    Asked while they live: their numbers go to others' namespaces as soon as they are gone.
    """
    found = {namespace(pid) for pid in program.living()} - {namespace("self")}
    made = {number for number in found if number is not None}
    inside = [path.name for path in Path("/proc").glob("[0-9]*") if namespace(path.name) in made]
    others = {int(pid) for pid in inside} - set(program.living())
    assert not [pid for pid in others if namespace(pid) in made]
    mounted = Path("/proc/self/mountinfo").read_text()  # as `ip netns` does to keep them
    assert not [number for number in made if f"net:[{number}]" in mounted]
    return made


def sent_a_megabyte(pid: int) -> bool:
    """Whether the namespace of a process has sent that much, over its loopback or its veth."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:  # it has ended
        return False
    counters = {line.partition(":")[0].strip(): line.partition(":")[2].split() for line in lines}
    return any(int(counters[name][8]) > 1e6 for name in ("lo", INTERFACE) if name in counters)


def ranks_start(bench: Marked) -> bool:
    assert bench.process.poll() is None, bench.end()
    return len(bench.ranks()) == 2


def ranks_send(bench: Marked) -> bool:
    return ranks_start(bench) and all(sent_a_megabyte(rank) for rank in bench.ranks())


@pytest.mark.parametrize("when", [ranks_start, ranks_send])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_benchmark_leaves_no_process_and_no_namespace(number, when, tmp_path):
    interfaces = set(os.listdir("/sys/class/net"))
    # Where the first link is impossible it is left out; the same must hold on the loopback.
    arguments = ["--quick", "--repeats", "100000", "--links", "1gbit", "loopback"]
    bench = Marked(
        sys.executable, "bench_sync.py", *arguments, "--out", str(tmp_path), tmp_path=tmp_path
    )
    try:
        bench.wait_until(lambda: when(bench), when.__name__)
        assert len(made_namespaces(bench)) == (2 if links_possible() else 0)
        os.kill(bench.process.pid, number)
        expected = -signal.SIGKILL if number == signal.SIGKILL else 130
        assert bench.process.wait(timeout=PATIENCE) == expected
        bench.wait_until(lambda: not bench.living(), "ended")
        assert set(os.listdir("/sys/class/net")) == interfaces
    finally:
        bench.end()


HOLD = """
import signal, time
from lib.netns import NamespacePair
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with NamespacePair("1gbit") as pair:
    print(pair.command_prefix(0), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_link_vanishes_with_the_process_that_made_it(number, tmp_path):
    maker = Marked(sys.executable, "-c", HOLD, tmp_path=tmp_path)
    try:
        assert maker.process.stdout is not None
        maker.process.stdout.readline()
        if not links_possible():  # and the program ends
            assert b"LinkUnavailable" in maker.process.stdout.read()
            return
        assert len(made_namespaces(maker)) == 2
        maker.process.send_signal(number)
        maker.wait_until(lambda: not maker.living(), "ended")
    finally:
        maker.end()


def test_a_link_is_shaped_and_its_ends_reach_each_other_where_links_are_possible():
    if not links_possible():
        with pytest.raises(LinkUnavailable):
            NamespacePair("1gbit").__enter__()
        return
    with NamespacePair("1gbit") as pair:
        for rank in range(2):
            queue = [*pair.command_prefix(rank), "tc", "qdisc", "show", "dev", INTERFACE]
            shown = subprocess.run(queue, capture_output=True, text=True, check=True).stdout
            assert "tbf" in shown and "rate 1Gbit" in shown
        server = subprocess.Popen(
            [*pair.command_prefix(0), sys.executable, "-c", SERVE], stdout=subprocess.PIPE
        )
        client = [*pair.command_prefix(1), sys.executable, "-c", CALL]
        assert server.stdout is not None and server.stdout.readline() == b"listening\n"
        answer = subprocess.run(client, capture_output=True, check=True, timeout=PATIENCE)
        assert answer.stdout == b"10.77.0.2\n"
        server.wait(timeout=PATIENCE)
        server.stdout.close()


SERVE = """
import socket
with socket.create_server(("10.77.0.1", 2000)) as server:
    print("listening", flush=True)
    connection, (host, _) = server.accept()
    connection.sendall(host.encode())
"""
CALL = """
import socket
print(socket.create_connection(("10.77.0.1", 2000), timeout=60).recv(100).decode())
"""


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_link_of_impossible_rate_is_unavailable_and_leaves_no_process():
    before = children()
    with pytest.raises(LinkUnavailable) as caught, NamespacePair("1furlong"):
        pass
    assert children() == before
    assert ("1furlong" in str(caught.value)) == links_possible()


def test_a_missing_command_is_named_with_its_package(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LinkUnavailable) as caught:
        NamespacePair("1gbit").__enter__()
    expected = "'ip' (package iproute2)" if os.geteuid() == 0 else "needs root"
    assert expected in str(caught.value)
