"""Figures go to the monitor that the user has."""

from __future__ import annotations

import json
import logging
import types
from typing import Any

import pytest
import torch

from sparse_comm.reduce import Reduction

FACTS: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "on_cpu": True,
    "bytes_dense": 8_000_000,
    "bytes_sent": 400_000,
    "collectives": 1,
}


def reduction(steps: int = 2, **facts: Any) -> Reduction:
    """With figures of some steps of one bucket."""
    made = Reduction(stats=True)
    assert made.recorder is not None
    for _ in range(steps):
        record = made.recorder.handed_over(0, **{**FACTS, **facts})
        record.sent()
        record.completed()
    return made


class SummaryWriter:
    """The part of TensorBoard's that is used."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        assert global_step is not None
        self.scalars[tag] = (float(scalar_value), global_step)


class Run:
    """The part of a W&B run that is used."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool = True) -> None:
        json.dumps(data)
        self.logged.append((data, step))


def test_a_logger_gets_one_line(caplog):
    with caplog.at_level(logging.INFO):
        reduction().write_stats(logging.getLogger("training"), 7)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("training", "INFO")
    line = record.getMessage()
    assert line.startswith("sparse_comm at step 7: 2 steps reduced, a step 0.400 MB sent in 1 coll")
    assert "8.000 MB if dense" in line
    assert all(f"{name} " in line for name in ("pack", "wire", "exposed"))
    assert line.endswith(" ms")


def test_a_logger_adapter_is_a_logger(caplog):
    adapter = logging.LoggerAdapter(logging.getLogger("training"), {})
    with caplog.at_level(logging.INFO):
        reduction().write_stats(adapter, 7)
    assert "at step 7" in caplog.text


def test_a_summary_writer_gets_scalars():
    writer = SummaryWriter()
    made = reduction()
    made.write_stats(writer, 7)
    figures = made.stats()
    assert {step for _, step in writer.scalars.values()} == {7}
    assert writer.scalars["sparse_comm/bytes_sent"] == (400_000.0, 7)
    assert writer.scalars["sparse_comm/steps"] == (2.0, 7)
    assert writer.scalars["sparse_comm/wire_s"] == (figures["wire_s"], 7)
    assert writer.scalars["sparse_comm/total/bytes_sent"] == (800_000.0, 7)
    names = [n for n in figures if n not in ("total", "buckets")]
    totals = [f"total/{n}" for n in figures["total"]]
    assert set(writer.scalars) == {f"sparse_comm/{name}" for name in names + totals}


def test_a_wandb_run_and_the_module_get_a_dict():
    run, module = Run(), types.ModuleType("wandb")
    module.log = run.log  # type: ignore[attr-defined]
    for writer in (run, module):
        reduction().write_stats(writer, 7)
    (first, step), (second, _) = run.logged
    assert step == 7
    assert first["sparse_comm/bytes_dense"] == 8_000_000
    assert set(first) == set(second)


def test_a_function_gets_what_stats_returns():
    given = []
    made = reduction()
    made.write_stats(lambda figures, step: given.append((figures, step)), 7)
    assert given == [(made.stats(), 7)]


def test_unknown_figures_are_left_out(caplog):
    made = reduction(bytes_dense=None, bytes_sent=None, collectives=None, on_cpu=False)
    writer, run = SummaryWriter(), Run()
    made.write_stats(writer, 1)
    made.write_stats(run, 1)
    assert set(writer.scalars) == set(run.logged[0][0])
    known = {"steps", "pack_s", "total/pack_s"}
    assert set(writer.scalars) == {f"sparse_comm/{name}" for name in known}
    with caplog.at_level(logging.INFO):
        made.write_stats(logging.getLogger("training"), 1)
        reduction(steps=0).write_stats(logging.getLogger("training"), 2)
    assert "None" not in caplog.text


def test_what_is_no_monitor_is_refused():
    for writer in (None, 3, "log.txt"):
        with pytest.raises(TypeError, match=r"write_stats takes a logging\.Logger.*got"):
            reduction().write_stats(writer, 1)  # type: ignore[arg-type]
