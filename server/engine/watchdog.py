"""Looks at the engine while it has something to do, and kills one that hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from server.engine.link import EngineLink
from server.engine.supervisor import TICK, Stall, SupervisorPolicy


class Watchdog:
    """`link` gives the engine of the moment. Idle unless `busy` is set: while requests are unfinished or an engine loads.

    `first_load` is how many seconds the first load took, once that is known. `on_stuck` is told why an engine was killed that is
    there all the same once as much time has passed again: a thread, or a process that the kernel cannot end.
    """

    def __init__(
        self, policy: SupervisorPolicy, link: Callable[[], EngineLink | None], on_stuck: Callable[[str], None]
    ) -> None:
        self.busy = asyncio.Event()
        self.first_load: float | None = None
        self._policy, self._link, self._on_stuck = policy, link, on_stuck
        self._stall = Stall()

    async def run(self) -> None:
        while True:
            if not self.busy.is_set():
                self._stall.reset()
                await self.busy.wait()
            await asyncio.sleep(TICK)
            link = self._link()
            if link is not None and not link.ended.is_set():
                self._look(link)

    def _look(self, link: EngineLink) -> None:
        entry = link.handle.board.read()
        if link.is_ready:
            limit, what = self._policy.step_limit(entry.predicted_seconds), "no step has ended"
        else:
            limit, what = self._policy.load_limit(self.first_load), "it has not loaded"
        if self._stall.look((link.epoch, link.is_ready, entry.serial), time.monotonic()) > limit:
            self._stall.reset()
            if link.fault is not None:
                self._on_stuck(link.fault)
            link.kill(f"{what} within {limit:.1f} s")
