"""Results, exceptions, exits, event loops, nesting, and the handle of a worker."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_spawn")
def test_spawn(check: str, place: str) -> None:
    run_check("attack_spawn", check, place)
