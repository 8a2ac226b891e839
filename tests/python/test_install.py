"""install(): what goes through os.fork works, and uninstall() puts it back."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_install")
def test_install(check: str, place: str) -> None:
    run_check("attack_install", check, place)
