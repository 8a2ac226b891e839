"""The guard, and cgroups."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_guard")
def test_guard(check: str, place: str) -> None:
    run_check("attack_guard", check, place)
