"""Options of one start, programs, detach, and what is reset in a worker."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_options")
def test_options(check: str, place: str) -> None:
    run_check("attack_options", check, place)
