"""Pipelines of two and of three stages: cells of the table, and tied values stay tied.

What each cell asserts stands in ``Row.check`` of rows.py, the rest in parallel.py; ranks run it.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from tests.integrations.cases import passed

from .parallel import PIPELINES, pipelines_go_on_where_they_were
from .rows import cases

CASES = {**cases(PIPELINES), "checkpoints": pipelines_go_on_where_they_were}
TIMEOUT = 200


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_trains_as_masked_dense_or_is_refused(name, world_size):
    passed(__name__, world_size, name)
