"""The guard, and cgroups."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check

# All methods one after the other, at seconds each; the first of these has rounds of its own.
SLOW = (
    "check_a_foreign_child_holds_the_lifeline",
    "check_a_frozen_worker",
    "check_a_user_namespace",
    "check_a_vfork_hangs",
    "check_a_worker_is_init_of_a_pid_namespace",
    "check_one_guard_for_all",
    "check_scope_cgroup",
    "check_the_owner_is_init_of_a_pid_namespace",
)


@pytest.mark.timeout(600)
@parametrized("attack_guard")
def test_guard(check: str, place: str, scale: float) -> None:
    for n in range(max(1, int(2 * scale)) if check in SLOW else max(1, int(5 * scale))):
        print(f"round {n}")  # what pytest captured tells which one failed
        run_check("attack_guard", check, place)
