"""Bad input: a clear error in the caller, nothing started, nothing changed."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_bad_input")
def test_bad_input(check: str, place: str) -> None:
    run_check("attack_bad_input", check, place)
