"""Trees of templates, snapshots, many workers at once."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_tree")
def test_tree(check: str, place: str) -> None:
    run_check("attack_tree", check, place)
