# SPDX-License-Identifier: AGPL-3.0-or-later
"""In the path of suite.py's interpreters: programs that tractor's suite runs by themselves.

Its examples for the debugger are such, and their backend is $TRACTOR_SPAWN_METHOD. That name
is registered for them, once they have imported tractor, as the plugin does for the suite.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "tractor":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                import anyfork_tractor

                anyfork_tractor.register({os.environ["TRACTOR_SPAWN_METHOD"]: method})

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


method = os.environ.get("ANYFORK_METHOD_OF_SUITE")
if method and "TRACTOR_SPAWN_METHOD" in os.environ:
    sys.meta_path.insert(0, _RegisterAfterImport())
