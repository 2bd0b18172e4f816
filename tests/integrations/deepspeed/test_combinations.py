"""Every cell of the table of combinations in docs/deepspeed.md holds what it promises."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from tests.integrations.cases import passed

from .combinations import ROWS
from .rows import cases

CASES = cases(ROWS)
TIMEOUT = 400  # DeepSpeed compiles its kernels at their first use, for a minute and a half


@pytest.mark.timeout(500)  # the first waits for all
@pytest.mark.parametrize("name", CASES)
def test_trains_as_masked_dense_or_is_refused(name):
    passed(__name__, 2, name)
