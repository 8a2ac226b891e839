"""Templates, standbys and their workers."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_template")
def test_template(check: str, place: str) -> None:
    run_check("attack_template", check, place)
