"""System calls that are not there: older kernels, containers with a seccomp filter."""

from __future__ import annotations

import pytest
from attack_helpers import parametrized, run_check


@pytest.mark.timeout(300)
@parametrized("attack_kernel")
def test_kernel(check: str, place: str) -> None:
    run_check("attack_kernel", check, place)
