# SPDX-License-Identifier: AGPL-3.0-or-later
"""A worker of anyfork, as tractor's supervision wants to see a process."""

from __future__ import annotations

import os

import trio

import anyfork


class ActorProcess:
    """The part of :class:`trio.Process` that tractor uses.

    Its pidfd stays open until :meth:`close`: closing one that a task waits for would
    lose the wake-up, since epoll forgets a closed descriptor without a word.
    """

    stdin = stdout = stderr = None  # the owner's, which the debugger needs

    def __init__(self, child: anyfork.Child) -> None:
        self._child = child
        assert child.pid is not None
        self.pid: int = child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def poll(self) -> int | None:
        """The exit code, or None while it runs; never waits."""
        if self._child.is_alive():
            return None
        code = self._child.returncode
        # Somebody else in this process reaped it, and nothing tells how it ended.
        return -255 if code is None else code

    async def wait(self) -> int:
        """Wait for its end; cancellable, any number of times, by any number of tasks."""
        await trio.lowlevel.checkpoint()
        while (code := self.poll()) is None:
            pidfd = self._child.pidfd
            assert pidfd is not None
            own = os.dup(pidfd)  # trio lets one task at a time wait for a descriptor
            try:
                await trio.lowlevel.wait_readable(own)
            finally:
                trio.lowlevel.notify_closing(own)
                os.close(own)
        return code

    def send_signal(self, sig: int) -> None:
        self._child.signal(sig)

    def terminate(self) -> None:
        self._child.terminate()

    def kill(self) -> None:
        self._child.kill()

    def why(self) -> BaseException | None:
        """What it raised or reported; only once it has ended."""
        return self._child.exception(0)

    def close(self) -> None:
        """Give back its descriptors; kills what still runs."""
        self._child.close()

    def __repr__(self) -> str:
        return f"<ActorProcess {self._child!r}>"
