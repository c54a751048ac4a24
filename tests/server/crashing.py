"""An engine in a process of its own that echoes prompts and crashes at certain tokens. Light to import: it is started often."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from server.engine.board import Board
from server.engine.process import ProcessHandle, serve_engine
from server.types import (
    AbortReason,
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Pooling,
    PoolRequest,
    RequestTimings,
    StepOutput,
    StepStats,
    TokenEvent,
)

KILL, SEGFAULT, HANG, RAISE = 900, 901, 902, 903  # prompt tokens that do this to every engine that computes them
KILL_FIRST = 910  # to the first engine only
STEP_SECONDS = 0.005
GATHER_SECONDS = 0.15  # that the first engine waits after its first request, so that those sent together meet in a step


class CrashingEngine:
    """Output token i is prompt token i mod length. Poisonous tokens act in the first step of their request."""

    def __init__(self, epoch: int, max_model_len: int, max_num_seqs: int = 4) -> None:
        self.info = EngineInfo(epoch, max_model_len, 64, 16, "crashing")
        self.on_launch: Callable[[list[str], float], None] | None = None
        self.max_num_seqs = max_num_seqs
        self.waiting: list[GenerateRequest | PoolRequest] = []
        self.outputs: dict[str, int] = {}
        self.events: list[TokenEvent] = []
        self.begin: float | None = None

    def submit(self, request: GenerateRequest | PoolRequest) -> None:
        assert len(request.prompt_token_ids) < self.info.max_model_len
        if self.begin is None:
            self.begin = time.monotonic() + (0.0 if self.info.epoch else GATHER_SECONDS)
        self.waiting.append(request)

    def abort(self, request_id: str, reason: AbortReason) -> None:
        for request in self.waiting:
            if request.request_id == request_id:
                self.waiting.remove(request)
                self.events.append(TokenEvent(request_id, [], finish_reason=reason.finish_reason))
                return

    def has_work(self) -> bool:
        return bool(self.waiting or self.events)

    def step(self) -> StepOutput:
        events, self.events = self.events, []
        alone = [request for request in self.waiting if request.alone and request.request_id not in self.outputs]
        batch = alone[:1] or self.waiting[: self.max_num_seqs]
        if self.on_launch is not None:
            self.on_launch([request.request_id for request in batch], 0.0)
        time.sleep(STEP_SECONDS)
        if self.begin is not None and time.monotonic() < self.begin:
            batch = []
        for request in batch:
            if request.request_id not in self.outputs:
                self._crash(request.prompt_token_ids)
        events += [self._advance(request) for request in batch]
        return StepOutput(self.info.epoch, events, StepStats(len(self.waiting), 0, 64, 0, 0))

    def _crash(self, prompt: list[int]) -> None:
        if KILL in prompt or (KILL_FIRST in prompt and self.info.epoch == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if SEGFAULT in prompt:
            os.kill(os.getpid(), signal.SIGSEGV)
        if HANG in prompt:
            time.sleep(1000)
        if RAISE in prompt:
            raise RuntimeError("planted failure")

    def _advance(self, request: GenerateRequest | PoolRequest) -> TokenEvent:
        prompt, now = request.prompt_token_ids, time.monotonic()
        timings = RequestTimings(request.arrival_time, now, now, now, 0)
        if isinstance(request, PoolRequest):
            self.waiting.remove(request)
            vector = [float(request.pooling is Pooling.MEAN), float(prompt[0])]
            return TokenEvent(request.request_id, [], 0, FinishReason.STOP, timings=timings, embedding=vector)
        index = self.outputs.setdefault(request.request_id, 0)
        self.outputs[request.request_id] += 1
        tokens = [prompt[index % len(prompt)]]
        if index + 1 < request.sampling.max_tokens:
            return TokenEvent(request.request_id, tokens)
        self.waiting.remove(request)
        return TokenEvent(request.request_id, tokens, 0, FinishReason.LENGTH, timings=timings)

    def close(self) -> None: ...


def _main(connection: Connection, board: Board, epoch: int, fails_to_load: bool, max_model_len: int) -> None:
    def build() -> CrashingEngine:
        if fails_to_load:
            raise ValueError("planted: it does not load")
        return CrashingEngine(epoch, max_model_len)

    os._exit(0 if serve_engine(build, connection, board, epoch, exit_when_orphaned=True) else 1)


def crashing_engine(epoch: int, fails_to_load: bool = False, max_model_len: int = 512) -> ProcessHandle:
    context = multiprocessing.get_context("spawn")
    board = Board(is_shared=True)
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(theirs, board, epoch, fails_to_load, max_model_len))
    process.start()
    theirs.close()
    return ProcessHandle(ours, board, process)
