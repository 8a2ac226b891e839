# SPDX-License-Identifier: AGPL-3.0-or-later
"""For suites that use tractor's own plugin: ``--spawn-backend`` takes anyfork's methods.

``--anyfork-method=fork`` runs that method under the name ``main_thread_forkserver``, to
which tractor's suite ties its time budgets and skips for backends that fork.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

_SUITE_NAME = "main_thread_forkserver"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anyfork-tractor")
    group.addoption(
        "--anyfork-method",
        metavar="METHOD",
        help=f"the method of anyfork behind --spawn-backend={_SUITE_NAME}",
    )


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    from . import METHODS, register

    register()
    method = early_config.known_args_namespace.anyfork_method
    if method is not None:
        if method not in METHODS:
            raise pytest.UsageError(f"--anyfork-method: {method!r} is none of {METHODS}")
        register({_SUITE_NAME: method})
    _teach(sys.modules.get("tractor._testing.pytest"))


def _teach(plugin: Any) -> None:
    """tractor's plugin has its own copies of what is known."""
    if plugin is None:
        return
    from tractor.spawn import _spawn

    from . import METHODS

    plugin.SpawnMethodKey = _spawn.SpawnMethodKey
    forks = frozenset(METHODS) - {"exec", "subint"}
    if hasattr(plugin, "_CAPSYS_REQUIRED_SPAWNERS"):
        plugin._CAPSYS_REQUIRED_SPAWNERS |= forks
    original = plugin._is_forking_spawner
    plugin._is_forking_spawner = lambda method: method in forks or original(method)
