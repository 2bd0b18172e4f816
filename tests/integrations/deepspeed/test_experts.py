"""Mixtures of experts: cells of the table, and experts over one or two ranks are the same.

What each cell asserts stands in ``Row.check`` of rows.py, the rest in parallel.py; ranks run it.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from tests.integrations.cases import passed

from .parallel import (
    EXPERTS,
    experts_do_not_depend_on_ep_size,
    experts_go_on_where_they_were,
)
from .rows import cases

CASES = {
    **cases(EXPERTS),
    "the same for ep_size 1 and 2": experts_do_not_depend_on_ep_size,
    "checkpoints": experts_go_on_where_they_were,
}
TIMEOUT = 200


@pytest.mark.parametrize("name", CASES)
def test_trains_as_masked_dense_or_is_refused(name):
    passed(__name__, 2, name)
