"""Templates and standbys that are killed at each of their steps."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_template_killed")
def test_template_killed(check: str, place: str) -> None:
    run_check("attack_template_killed", check, place)
