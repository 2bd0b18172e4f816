"""Every cell of the table of combinations in docs/deepspeed.md holds what it promises."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from tests.integrations.cases import passed

from .combinations import ROWS
from .rows import cases
from .table import PAGE, rewritten

CASES = cases(ROWS)
TIMEOUT = 400  # DeepSpeed compiles its kernels at their first use, for a minute and a half


@pytest.mark.timeout(500)  # the first waits for all
@pytest.mark.parametrize("name", CASES)
def test_trains_as_masked_dense_or_is_refused(name):
    passed(__name__, 2, name)


def test_the_page_shows_the_table():
    page = PAGE.read_text()
    assert page == rewritten(page), "run: python -m tests.integrations.deepspeed.table"
