"""What fork() in a sub-interpreter keeps, and what it must not do."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_twin")
def test_twin(check: str, place: str) -> None:
    run_check("attack_twin", check, place)
