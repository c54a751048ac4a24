"""Load on an OpenAI-compatible server: random prompts, streamed completions, and what each request's client saw."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from server.sse_client import ClientError, SseClient

FALLBACK_VOCAB_SIZE = 30_000  # of servers that do not tell; most models have more

_WORD_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason"
)


class LoadError(Exception):
    """The measurement cannot be made; one line says why."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is sent. `concurrency` 0 is unlimited; `request_rate` 0 is closed loop."""

    num_prompts: int = 32
    concurrency: int = 8
    request_rate: float = 0.0
    input_len: int = 128
    output_len: int = 64
    length_spread: float = 0.0  # lengths vary uniformly by this share
    shared_prefix_len: int = 0
    as_text: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Sample:
    """One request as its client saw it; times in seconds of the monotonic clock."""

    start: float
    chunk_times: list[float] = field(default_factory=list)
    end: float = 0.0
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int = 0
    num_asked_tokens: int = 0
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Output tokens: the server's count, or one per chunk."""
        return len(self.chunk_times) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def first_token_seconds(self) -> float:
        return self.chunk_times[0] - self.start

    @property
    def per_token_seconds(self) -> float:
        """Mean time per token after the first."""
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.num_tokens - 1)


def make_requests(workload: Workload, vocab_size: int) -> list[tuple[list[int] | str, int]]:
    """(prompt, output length) of every request; the same for the same workload. Ids stay clear of both ends of the
    vocabulary, where special tokens tend to be."""
    generator = random.Random(workload.seed)
    low, high = vocab_size // 10, max(vocab_size // 10 + 1, vocab_size * 9 // 10)

    words = _WORD_TEXT.split()

    def units(length: int) -> list[Any]:
        return [generator.choice(words) if workload.as_text else generator.randrange(low, high) for _ in range(length)]

    def vary(length: int) -> int:
        spread = int(length * workload.length_spread)
        return max(1, length + generator.randint(-spread, spread))

    prefix = units(workload.shared_prefix_len)
    requests: list[tuple[list[int] | str, int]] = []
    for _ in range(workload.num_prompts):
        prompt = prefix + units(max(1, vary(workload.input_len) - len(prefix)))
        requests.append((" ".join(prompt) if workload.as_text else prompt, vary(workload.output_len)))
    return requests


class _Choice(Struct):
    text: str | None = None
    finish_reason: str | None = None


class _PromptDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(Struct):
    """What counts in a chunk of a streamed completion."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_CHUNK_DECODER = msgspec.json.Decoder(_Chunk)


class Target:
    """The server under load. `probe` first: it finds out which fields the server takes."""

    def __init__(self, client: SseClient, model: str, temperature: float) -> None:
        self._client = client
        self._model = model
        self._temperature = temperature
        self._optional: dict[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}

    async def probe(self, prompt: list[int] | str) -> Sample:
        """A first request, which also warms the server up. Fields that the server refuses by name are left out after."""
        while True:
            sample = await self.complete(prompt, 2)
            refused = [name for name in self._optional if sample.error is not None and name in sample.error]
            if not refused:
                if sample.error is not None:
                    raise LoadError(f"the first request failed: {sample.error}")
                return sample
            for name in refused:
                del self._optional[name]

    async def complete(self, prompt: list[int] | str, num_tokens: int) -> Sample:
        """Stream one completion. Errors end up in the sample."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": self._temperature,
            "stream": True,
            **self._optional,
        }
        data = msgspec.json.encode(body)
        sample = Sample(time.monotonic(), num_asked_tokens=num_tokens)
        try:
            async for payload in self._client.post("/v1/completions", data):
                _record(sample, _CHUNK_DECODER.decode(payload))
            if not sample.chunk_times and sample.error is None:
                sample.error = "the stream held no tokens"
        except (ClientError, msgspec.MsgspecError) as error:
            sample.error = str(error)
        sample.end = time.monotonic()
        return sample


def _record(sample: Sample, chunk: _Chunk) -> None:
    if chunk.error:
        sample.error = json.dumps(chunk.error)
    if chunk.choices:
        choice = chunk.choices[0]
        # A bare end (no text, only a finish reason) is no token, except as the only chunk of a request.
        if choice.text or choice.finish_reason is None or not sample.chunk_times:
            sample.chunk_times.append(time.monotonic())
    if chunk.usage is not None:
        sample.num_prompt_tokens = chunk.usage.prompt_tokens
        sample.num_output_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        sample.num_cached_tokens = 0 if details is None else details.cached_tokens or 0


async def run_load(target: Target, workload: Workload, requests: Sequence[tuple[list[int] | str, int]]) -> list[Sample]:
    """Send everything, as the workload says, and wait for all answers."""
    slots = asyncio.Semaphore(workload.concurrency or len(requests))
    generator = random.Random(workload.seed + 1)

    async def one(prompt: list[int] | str, num_tokens: int) -> Sample:
        async with slots:
            return await target.complete(prompt, num_tokens)

    tasks = []
    for index, (prompt, num_tokens) in enumerate(requests):
        if workload.request_rate > 0 and index > 0:
            await asyncio.sleep(generator.expovariate(workload.request_rate))
        tasks.append(asyncio.ensure_future(one(prompt, num_tokens)))
    return await asyncio.gather(*tasks)


async def find_model(base_url: str, headers: Mapping[str, str], wanted: str | None) -> tuple[str, int | None]:
    """The model's name, and its vocabulary's size where the server tells. Raises LoadError."""
    try:
        async with httpx.AsyncClient(headers=headers, timeout=30, trust_env=False) as client:
            response = await client.get(f"{base_url}/v1/models")
        response.raise_for_status()
        models = response.json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        if wanted is not None:
            return wanted, None
        raise LoadError(f"cannot list the models of {base_url}: {error or type(error).__name__}") from None
    for model in models:
        if wanted in (None, model["id"]):
            return model["id"], model.get("vocab_size")
    if wanted is None:
        raise LoadError(f"{base_url} serves no model")
    return wanted, None
