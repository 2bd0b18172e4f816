"""Each program of docs/axonn-defects.md fails on AxoNN as released, and passes with ours.

``python -m tests.integrations.axonn.test_defects``, under mpirun, runs those that need MPI.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from axonn import axonn as ax
from sparse_comm.integrations import axonn as sparse_axonn

from tests.integrations.axonn.test_launchers import launch, needs_mpi
from tests.integrations.cases import Cases, passed
from tests.launch import RankError, outcomes

PAGE = (Path(__file__).parents[3] / "docs" / "axonn-defects.md").read_text()
START, *_ = re.findall(r"^```py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROGRAMS = {
    " ".join(title.split()): program
    for title, program in re.findall(
        r"^\*\*([^*]+)\*\*[^`]*(?:`[^`]+`[^`]*)*?\n\n```py\n(.*?)^```$",
        PAGE,
        re.MULTILINE | re.DOTALL,
    )
}
FP16 = next(title for title in PROGRAMS if "fp16" in title)
WITH_MPI = [t for t, program in PROGRAMS.items() if "G_inter=2" in program and "Engine" in program]
CASES: Cases = {}


def run(program: str, ours: bool) -> None:
    names: dict[str, Any] = {}
    exec(START, names)
    if not ours:
        with sparse_axonn.on_cpu():
            exec(program, names)
        return

    def average(model: Any) -> None:
        engine = sparse_axonn.InterLayerEngine(model, None, names["torch"].float32)
        engine._buckets.reduce()
        engine._buckets.wait()

    names |= {"init": sparse_axonn.init, "Engine": sparse_axonn.InterLayerEngine}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program, names | {"average": average})
    finally:
        sparse_axonn.shutdown()


def both(rank: int, world_size: int, *, title: str) -> None:
    with pytest.raises(Exception) as failed:
        run(PROGRAMS[title], ours=False)
    assert not isinstance(failed.value, NameError)
    ax.is_initialized = False
    run(PROGRAMS[title], ours=True)


for _title in PROGRAMS:
    if _title not in WITH_MPI and _title != FP16:
        CASES[_title] = functools.partial(both, title=_title)


def test_the_page_has_its_programs():
    assert len(PROGRAMS) == PAGE.count("```py\n") - 1
    assert len(WITH_MPI) == 2


@pytest.mark.parametrize("title", CASES)
def test_a_program_fails_on_axonn_and_passes_with_ours(title):
    passed(__name__, 2, title)


def run_fp16(rank: int, world_size: int, ours: bool) -> None:
    run(PROGRAMS[FP16], ours)


def test_fp16_without_mpi_ends_axonns_process_and_not_ours():
    for outcome in outcomes(run_fp16, 2, False, timeout=30):
        assert outcome.error is not None
        assert not isinstance(outcome.error, (NameError, AssertionError)) or isinstance(
            outcome.error, RankError
        )
    assert all(outcome.error is None for outcome in outcomes(run_fp16, 2, True))


@needs_mpi
@pytest.mark.alone
def test_pipelines_over_mpi_fail_in_axonn_and_pass_in_ours(tmp_path):
    printed, code = launch("mpirun", 2, tmp_path, program=__name__)
    assert code == 0, printed
    for title in WITH_MPI:
        assert printed.count(f"{title}: fails in AxoNN, passes here") == 2, printed


def main() -> None:
    sparse_axonn.init(G_data=2)  # makes the process group
    sparse_axonn.shutdown()
    for title in WITH_MPI:
        both(0, 2, title=title)
        print(f"{title}: fails in AxoNN, passes here", flush=True)


if __name__ == "__main__":
    sys.exit(main())
