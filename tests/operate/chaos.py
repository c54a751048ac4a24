"""`python -m tests.operate.chaos MODEL`: kills, segfaults and stops the engine of a loaded server at random moments, and accounts
for every request.

Greedy answers are compared with those of the undisturbed server; the text before an error must be the beginning of one. The last
line is JSON. Exit code 1 where a request was not answered, answered with something else, or the engine was back too late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.operate.processes import engine_pid
from tests.served import Server

SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP)
REQUEST_TIMEOUT = 120.0  # a request without an answer after that hangs
BACK_WITHIN = 10.0  # seconds from the detection of a fault to the next request taken
_POLL = 0.02
_PAUSE = 0.5  # seconds of a client that was told to come back later
_BROKEN_OFF = "error in the stream"
_WORDS = "river bread engine winter letter garden mirror planet bridge violin copper forest"


@dataclass(frozen=True)
class Question:
    """A body to post, and where."""

    path: str
    body: dict[str, Any]

    @property
    def key(self) -> str:
        return json.dumps([self.path, self.body], sort_keys=True)


@dataclass
class Tally:
    """What became of the requests, and of the faults."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    detected: dict[str, list[float]] = field(default_factory=dict)  # seconds from the signal to /health 503
    back: list[float] = field(default_factory=list)  # seconds from there to /health 200


def questions(count: int) -> list[Question]:
    generator = random.Random(1)
    words = _WORDS.split()
    made = []
    for index in range(count):
        subject = " ".join(generator.sample(words, 3))
        if index % 8 == 7:
            made.append(Question("/v1/embeddings", {"input": [f"{subject} {index}", f"more {subject}"]}))
            continue
        made.append(
            Question(
                "/v1/completions",
                {
                    "prompt": f"{index}. Here is a short text about {subject}:" * generator.choice((1, 1, 1, 12)),
                    "max_tokens": generator.choice((1, 8, 24, 48)),
                    "temperature": 0,
                    "ignore_eos": True,
                    "n": 2 if index % 8 == 3 else 1,
                },
            )
        )
    return made


class Load:
    """Clients that ask, compare and count until told to stop."""

    def __init__(self, http: httpx.AsyncClient, asked: list[Question], seed: int) -> None:
        self.http = http
        self.questions = asked
        self.tally = Tally()
        self.expected: dict[str, Any] = {}
        self.done = asyncio.Event()
        self._random = random.Random(seed)

    async def learn(self) -> None:
        slots = asyncio.Semaphore(8)

        async def one(question: Question) -> None:
            async with slots:
                answer = await self.http.post(question.path, json=question.body)
                assert answer.status_code == 200, answer.text
                self.expected[question.key] = self._content(question, answer.json())

        await asyncio.gather(*map(one, self.questions))

    async def client(self) -> None:
        while not self.done.is_set():
            question = self._random.choice(self.questions)
            sent = question
            if (
                question.path == "/v1/completions"
            ):  # does not change a greedy answer, and tells the server's suspicions apart
                sent = Question(question.path, question.body | {"seed": self._random.getrandbits(40)})
            is_streamed = question.path == "/v1/completions" and self._random.random() < 0.5
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    outcome, content = await (self._stream if is_streamed else self._whole)(sent)
                    if content is not None:
                        outcome = self._judge(question, content, outcome)
            except TimeoutError:
                outcome = "hung"
            except httpx.HTTPError as error:
                outcome = f"connection lost ({type(error).__name__})"
            self.tally.outcomes[outcome] += 1
            if outcome.startswith("503"):
                await asyncio.sleep(_PAUSE)

    async def _whole(self, question: Question) -> tuple[str, list[Any] | None]:
        """The outcome by the looks of it, and the content to compare."""
        answer = await self.http.post(question.path, json=question.body)
        if answer.status_code != 200:
            return self._error(answer.status_code, answer.json()["error"]), None
        return "200", self._content(question, answer.json())

    async def _stream(self, question: Question) -> tuple[str, list[Any] | None]:
        texts = [""] * question.body["n"]
        ends: Counter[int] = Counter()
        error = None
        async with self.http.stream("POST", question.path, json=question.body | {"stream": True}) as answer:
            if answer.status_code != 200:
                return self._error(answer.status_code, json.loads(await answer.aread())["error"]), None
            lines = [line async for line in answer.aiter_lines() if line]
        if lines[-1:] != ["data: [DONE]"]:
            return "stream cut off", None
        for line in lines[:-1]:
            event = json.loads(line.removeprefix("data: "))
            error = event.get("error", error)
            for choice in event.get("choices", ()):
                texts[choice["index"]] += choice["text"]
                ends[choice["index"]] += choice["finish_reason"] is not None
        if max(ends.values(), default=0) > 1:
            return "answered twice", None
        return "200" if error is None else _BROKEN_OFF, texts

    def _error(self, status: int, error: dict[str, Any]) -> str:
        return f"{status} {error['code']}"

    @staticmethod
    def _content(question: Question, answer: dict[str, Any]) -> list[Any]:
        if question.path == "/v1/embeddings":
            return [item["embedding"] for item in answer["data"]]
        return [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

    def _judge(self, question: Question, content: list[Any], outcome: str) -> str:
        expected = self.expected[question.key]
        if outcome == "200" and content == expected:
            return outcome
        if outcome == _BROKEN_OFF and all(
            whole.startswith(part) for whole, part in zip(expected, content, strict=True)
        ):
            return outcome
        self.tally.wrong.append(f"{question.body}: {content!r}, expected {expected!r}")
        return "wrong"


async def inject(server: Server, probe: httpx.AsyncClient, tally: Tally, count: int, generator: random.Random) -> None:
    """One fault after the other, each when the server has been up again for a moment."""
    for index in range(count):
        await asyncio.sleep(generator.uniform(0.2, 1.5))
        number = SIGNALS[index % len(SIGNALS)]
        pid = engine_pid(server.process.pid)
        assert pid is not None
        begin = time.monotonic()
        os.kill(pid, number)
        await until_health(probe, is_up=False)
        noticed = time.monotonic()
        await until_health(probe, is_up=True)
        tally.detected.setdefault(number.name, []).append(noticed - begin)
        tally.back.append(time.monotonic() - noticed)
        print(f"{index + 1}: {number.name} noticed after {noticed - begin:.2f} s, back after {tally.back[-1]:.2f} s more",
              flush=True)  # fmt: skip


async def until_health(probe: httpx.AsyncClient, is_up: bool) -> None:
    async with asyncio.timeout(90):
        while ((await probe.get("/health")).status_code == 200) is not is_up:
            assert (await probe.get("/live")).status_code == 200
            await asyncio.sleep(_POLL)


async def run(server: Server, num_faults: int, num_clients: int, seed: int) -> Tally:
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT + 10, limits=limits, trust_env=False) as http,
        httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as probe,
    ):
        load = Load(http, questions(96), seed)
        await load.learn()
        clients = [asyncio.ensure_future(load.client()) for _ in range(num_clients)]
        try:
            await inject(server, probe, load.tally, num_faults, random.Random(seed))
            await asyncio.sleep(1)
        finally:
            load.done.set()
            await asyncio.gather(*clients)
        return load.tally


def violations(server: Server, tally: Tally, num_faults: int, back_within: float = BACK_WITHIN) -> list[str]:
    """What must not be."""
    found = [f"{count} requests: {outcome}" for outcome, count in tally.outcomes.items() if not _is_clean(outcome)]
    found += tally.wrong[:5]
    if max(tally.back) > back_within:
        found.append(f"the engine was back after {max(tally.back):.1f} s, not within {back_within:g} s")
    restarts = server.metric("awqserve_engine_restarts_total")
    if restarts != num_faults:
        found.append(f"{restarts:g} restarts for {num_faults} faults")
    for gauge in ("awqserve_num_requests_running", "awqserve_num_requests_waiting", "awqserve_kv_cache_usage_perc"):
        if server.metric(gauge):
            found.append(f"{gauge} is {server.metric(gauge):g} with nothing left to do")
    return found


def _is_clean(outcome: str) -> bool:
    return outcome in (
        "200",
        "error in the stream",
        "500 engine_error",
        "503 engine_unavailable",
        "400 refused_fingerprint",
    )


def figures(server: Server, tally: Tally) -> dict[str, Any]:

    def median_and_most(seconds: list[float]) -> list[float]:
        return [round(statistics.median(seconds), 2), round(max(seconds), 2)]

    return {
        "faults": len(tally.back),
        "noticed_seconds": {name: median_and_most(seconds) for name, seconds in tally.detected.items()},
        "back_seconds": median_and_most(tally.back),
        "requests": dict(tally.outcomes.most_common()),
        "retried": int(server.metric("awqserve_retried_requests_total")),
        "hung": tally.outcomes["hung"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.operate.chaos", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with Server(
        options.model, "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "200M"
    ) as server:
        tally = asyncio.run(run(server, options.faults, options.clients, options.seed))
        found = violations(server, tally, options.faults)
        print("\n".join(found))
        print(json.dumps(figures(server, tally)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
