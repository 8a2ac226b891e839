# SPDX-License-Identifier: AGPL-3.0-or-later
"""anyfork's spawn methods as backends of tractor, without a change to tractor.

    import anyfork_tractor
    anyfork_tractor.register()

    async with tractor.open_nursery(start_method="fork") as nursery:
        portal = await nursery.start_actor("kid", enable_modules=[__name__])

``start_method`` is then any of :data:`METHODS`; ``start_actor(proc_kwargs=...)`` takes
the options of :func:`anyfork.spawn`.
"""

from ._backend import METHODS, register

__all__ = ["METHODS", "register"]
