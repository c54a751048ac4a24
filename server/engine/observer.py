"""What the engine's client tells of what passes, for metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from server.types import EngineInfo, FinishReason, GenerateRequest, PoolRequest, StepOutput


class EngineObserver(Protocol):
    """Called on the event loop; must be quick."""

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None: ...

    def on_step(self, output: StepOutput) -> None: ...

    def on_lost(self, request_ids: Iterable[str], reason: FinishReason) -> None:
        """These have ended without the engine saying so."""

    def on_crash(self, num_retried: int) -> None:
        """The engine is gone; so many requests are computed again on the next."""

    def on_start(self, info: EngineInfo, is_restart: bool) -> None:
        """An engine is ready that is not the first: after a crash, or a reload."""

    def on_refused(self) -> None:
        """A request was refused since it was running in several crashes."""


class NoObserver:
    """Nobody looks."""

    def on_submit(self, request: GenerateRequest | PoolRequest) -> None: ...

    def on_step(self, output: StepOutput) -> None: ...

    def on_lost(self, request_ids: Iterable[str], reason: FinishReason) -> None: ...

    def on_crash(self, num_retried: int) -> None: ...

    def on_start(self, info: EngineInfo, is_restart: bool) -> None: ...

    def on_refused(self) -> None: ...
