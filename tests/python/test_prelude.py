"""What another thread held at the fork does not stop a worker, or reach into it."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_prelude")
def test_prelude(check: str, place: str) -> None:
    run_check("attack_prelude", check, place)
