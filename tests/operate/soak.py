"""Hours in half an hour: mixed streaming load past capacity, and clients that behave badly among it. `make soak`.

    python -m tests.operate.soak MODEL [--minutes 30] [--clients 20] [--requests 10000]

Starts a server whose queue is short, and sends whole and streamed completions, chats, embeddings, disconnects, timeouts, wrong
bodies and wrong keys, for as long as --minutes and until --requests have been sent. Greedy answers are compared with those that
the same prompts had alone at the start. At the end: no process has grown by more than 1% per 10 minutes over the last two thirds
(PSS, a line through all samples), every KV block is free, what the clients counted is what the metrics counted, and nothing hangs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.operate.processes import Growth, process_tree, slope_per_10_minutes
from tests.served import Server

KEY = "soak-client-0123456789"
SAMPLE_SECONDS = 5.0
ANSWER_SECONDS = 120.0  # past that an answer counts as hung
LENGTHS = (8, 24, 64)
_SHOWN = {"skip_special_tokens": False}  # as /detokenize shows them

TOPICS = (
    "the sea", "a bridge", "copper", "the moon", "rain", "a clock", "bread", "glass", "salt", "a river", "iron", "wool",
    "paper", "a library", "snow", "an engine", "the heart", "a garden", "sand", "thunder",
)  # fmt: skip
FORMS = (
    "Tell me about {}.",
    "{} is important because",
    "Once upon a time there was {}, and",
    "List three facts on {}:",
)


@dataclass
class Counts:
    """What the clients sent and got. `wrong`: what must not be."""

    by_kind: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)  # of answers that were waited for
    compared: int = 0
    sequences: int = 0  # of answers that came whole
    left: int = 0  # answers that their client did not wait for
    wrong: list[str] = field(default_factory=list)

    @property
    def num_sent(self) -> int:
        return sum(self.by_kind.values())


class Load:
    """One soak's clients. `expected`: (prompt, tokens) to the text of the greedy answer."""

    def __init__(self, url: str, seed: int, topics: tuple[str, ...]) -> None:
        self._topics = topics
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=ANSWER_SECONDS, limits=limits, trust_env=False
        )
        self.random = random.Random(seed)
        self.counts = Counts()
        self.expected: dict[tuple[str, int], str] = {}
        self._kinds = [
            (self._whole, 25), (self._streamed, 35), (self._chat, 10), (self._choices, 5), (self._embeddings, 5),
            (self._leave_stream, 10), (self._leave_whole, 4), (self._wrong_body, 4), (self._wrong_key, 2),
        ]  # fmt: skip

    def _prompt(self) -> tuple[str, int]:
        form, topic = self.random.choice(FORMS), self.random.choice(self._topics)
        return form.format(topic), self.random.choice(LENGTHS)

    @staticmethod
    def _body(prompt: str, num_tokens: int, **fields: Any) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **_SHOWN} | fields

    async def learn(self) -> None:
        """The answers to all prompts, one at a time: undisturbed."""
        for form in FORMS:
            for topic in self._topics:
                prompt = form.format(topic)
                longest = await self.http.post(
                    "/v1/completions", json=self._body(prompt, max(LENGTHS), return_token_ids=True)
                )
                token_ids = longest.json()["choices"][0]["token_ids"]
                for length in LENGTHS:
                    answer = await self.http.post("/detokenize", json={"tokens": token_ids[:length]})
                    self.expected[prompt, length] = answer.json()["prompt"]

    async def client(self, goes_on: Any) -> None:
        kinds, weights = zip(*self._kinds, strict=True)
        while goes_on():
            [kind] = self.random.choices(kinds, weights)
            self.counts.by_kind[kind.__name__.strip("_")] += 1
            try:
                async with asyncio.timeout(ANSWER_SECONDS + 10):
                    await kind()
            except TimeoutError:
                self.counts.wrong.append(f"{kind.__name__}: hung")
            except httpx.HTTPError as error:
                self.counts.wrong.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _compare(self, prompt: str, num_tokens: int, text: str, where: str) -> None:
        self.counts.compared += 1
        expected = self.expected[prompt, num_tokens]
        if text.strip() != expected.strip():
            self.counts.wrong.append(f"{where}: {prompt!r} was answered {text!r}, not {expected!r}")

    async def _note(self, response: httpx.Response, *allowed: int) -> bool:
        """Whether it is a 200. A 429 says when to come again, and is obeyed in part."""
        self.counts.by_status[response.status_code] += 1
        if response.status_code == 429:
            if not response.headers.get("retry-after", "").isdecimal():
                self.counts.wrong.append("a 429 without Retry-After")
            await asyncio.sleep(self.random.uniform(0.5, 2))
        elif response.status_code not in (200, *allowed):
            self.counts.wrong.append(f"HTTP {response.status_code}: {response.text[:200]}")
        return response.status_code == 200

    async def _whole(self) -> None:
        prompt, num_tokens = self._prompt()
        response = await self.http.post("/v1/completions", json=self._body(prompt, num_tokens))
        if await self._note(response):
            self.counts.sequences += 1
            self._compare(prompt, num_tokens, response.json()["choices"][0]["text"], "whole")

    async def _streamed(self) -> None:
        prompt, num_tokens = self._prompt()
        text, is_done = "", False
        async with self.http.stream(
            "POST", "/v1/completions", json=self._body(prompt, num_tokens, stream=True)
        ) as response:
            if not await self._note(response):
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.counts.wrong.append(f"streamed: {event}")
                        return
                    text += "".join(choice["text"] for choice in event["choices"])
        self.counts.sequences += 1
        if not is_done:
            self.counts.wrong.append("a stream without its end")
        self._compare(prompt, num_tokens, text, "streamed")

    async def _chat(self) -> None:
        prompt, num_tokens = self._prompt()
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": num_tokens, "stream": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if await self._note(response):
                self.counts.sequences += 1
                lines = [line async for line in response.aiter_lines()]
                if "data: [DONE]" not in lines:
                    self.counts.wrong.append("a chat without its end")

    async def _choices(self) -> None:
        prompt, num_tokens = self._prompt()
        response = await self.http.post("/v1/completions", json=self._body(prompt, num_tokens, n=3))
        if await self._note(response):
            for choice in response.json()["choices"]:
                self.counts.sequences += 1
                self._compare(prompt, num_tokens, choice["text"], "choices")

    async def _embeddings(self) -> None:
        texts = [self._prompt()[0] for _ in range(self.random.randint(1, 4))]
        response = await self.http.post("/v1/embeddings", json={"input": texts})
        if await self._note(response):
            self.counts.sequences += len(texts)
            if len(response.json()["data"]) != len(texts):
                self.counts.wrong.append("embeddings are missing")

    async def _leave_stream(self) -> None:
        """Leaves after some events, before the end."""
        prompt, _ = self._prompt()
        async with self.http.stream("POST", "/v1/completions", json=self._body(prompt, 200, stream=True)) as response:
            if not await self._note(response):
                return
            self.counts.left += 1
            number = self.random.randint(0, 20)
            async for _line in response.aiter_lines():
                number -= 1
                if number < 0:
                    return

    async def _leave_whole(self) -> None:
        """A client whose patience ends first."""
        prompt, _ = self._prompt()
        try:
            response = await self.http.post(
                "/v1/completions", json=self._body(prompt, 300), timeout=self.random.uniform(0.01, 0.6)
            )
            is_whole = await self._note(response)
            self.counts.sequences += is_whole
        except httpx.TimeoutException:
            self.counts.left += 1

    async def _wrong_body(self) -> None:
        bodies = [
            b"",
            b"{",
            b'{"prompt": 5}',
            b'{"prompt": "a", "x": 1}',
            b'{"prompt": "a", "temperature": 9}',
            b'{"prompt": "\xff"}',
        ]
        response = await self.http.post(
            "/v1/completions", content=self.random.choice(bodies), headers={"Content-Type": "application/json"}
        )
        if await self._note(response, 400):
            self.counts.wrong.append("a wrong body was taken")

    async def _wrong_key(self) -> None:
        body = self._body("a", 1)
        if await self._note(
            await self.http.post("/v1/completions", json=body, headers={"Authorization": "Bearer no"}), 401
        ):
            self.counts.wrong.append("a wrong key was taken")


def run(
    model: Path, minutes: float, num_clients: int, num_requests: int, seed: int = 0, num_topics: int = len(TOPICS)
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(f"soak:{KEY}\n")
        flags = ("--api-key-file", str(keys), "--max-num-seqs", "8", "--max-queued-requests", "6")
        with Server(model, *flags, "--kv-cache-memory-bytes", "60M", "--max-model-len", "1024") as server:
            server.client.headers["Authorization"] = f"Bearer {KEY}"
            found = asyncio.run(
                _soak(server, minutes, num_clients, num_requests, Load(server.url, seed, TOPICS[:num_topics]))
            )
            found["accounts"] = _accounts(server)
    return found


async def _soak(server: Server, minutes: float, num_clients: int, num_requests: int, load: Load) -> dict[str, Any]:
    growth = {name: Growth(name) for name in ("server", "engine")}
    await load.learn()
    begin = time.monotonic()
    until = begin + minutes * 60

    def goes_on() -> bool:
        return time.monotonic() < until or load.counts.num_sent < num_requests

    async def watch() -> None:
        while goes_on():
            for name, process in process_tree(server.process.pid).items():
                growth[name].sample(time.monotonic() - begin, process)
            await asyncio.sleep(SAMPLE_SECONDS)
            print(f"{time.monotonic() - begin:6.0f} s: {load.counts.num_sent} requests, {growth['server'].last / 2**20:.1f} + "
                  f"{growth['engine'].last / 2**20:.1f} MiB, {len(load.counts.wrong)} wrong", flush=True)  # fmt: skip

    await asyncio.gather(watch(), *(load.client(goes_on) for _ in range(num_clients)))
    await load.http.aclose()
    seconds = time.monotonic() - begin
    return {
        "seconds": round(seconds),
        "requests": load.counts.num_sent,
        "kinds": dict(load.counts.by_kind),
        "statuses": dict(load.counts.by_status),
        "left": load.counts.left,
        "compared": load.counts.compared,
        "sequences": load.counts.sequences,
        "wrong": load.counts.wrong,
        "growth_per_10_minutes": {
            name: round(slope_per_10_minutes(one, seconds / 3), 5) for name, one in growth.items()
        },
        "pss_mib": {name: round(one.last / 2**20, 1) for name, one in growth.items()},
        "learned": len(load.expected) // len(LENGTHS),
    }


def _accounts(server: Server) -> dict[str, float]:
    """What the metrics counted, once all is quiet."""
    deadline = time.monotonic() + 30
    idle = ("awqserve_num_requests_running", "awqserve_num_requests_waiting", "awqserve_num_prompt_tokens_waiting")
    while any(server.metric(name) for name in idle) or server.metric("awqserve_kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "requests or blocks are left"
        time.sleep(0.1)
    text = server.client.get("/metrics").text
    finished = {
        line.split('finished_reason="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("awqserve_request_success_total")
    }
    http = 0.0
    for line in text.splitlines():
        if line.startswith("http_requests_total") and 'handler="/detokenize"' not in line:
            http += float(line.rsplit(" ", 1)[1])
    return {
        "http": http,
        "rejected": server.metric("awqserve_admission_rejections_total"),
        "unauthorized": _labelled(text, "awqserve_http_refusals_total", "unauthorized"),
        "finished": sum(finished.values()),
        "errors": finished["error"],
    }


def _labelled(text: str, name: str, value: str) -> float:
    """A metric's sample with this value among its labels."""
    [line] = [line for line in text.splitlines() if line.startswith(f"{name}{{") and f'"{value}"' in line]
    return float(line.rsplit(" ", 1)[1])


def check(found: dict[str, Any], most_growth: float = 0.01) -> list[str]:
    """What is not as it should be."""
    statuses, accounts = found["statuses"], found["accounts"]
    problems = list(found["wrong"][:10])
    for name, growth in found["growth_per_10_minutes"].items():
        if growth > most_growth:
            problems.append(f"{name} grows by {growth:.2%} per 10 minutes")
    # Who leaves may do so before the server has heard of the request, or before or after it counts as finished.
    sent, left, learned = found["requests"] + found["learned"], found["left"], found["learned"]
    for what, least, counted, most in (
        ("requests were sent", sent - left, accounts["http"], sent),
        ("answers were 429", statuses.get(429, 0), accounts["rejected"], statuses.get(429, 0) + left),
        (
            "sequences were answered",
            found["sequences"] + learned,
            accounts["finished"],
            found["sequences"] + learned + left,
        ),
        ("keys were wrong", statuses.get(401, 0), accounts["unauthorized"], statuses.get(401, 0) + left),
    ):
        if not least <= counted <= most:
            problems.append(f"{least} to {most} {what}, {counted:g} are counted")
    if accounts["errors"]:
        problems.append(f"{accounts['errors']:g} requests ended in an error")
    if not statuses.get(429):
        problems.append("the load never passed the capacity")
    if not found["compared"]:
        problems.append("no answer was compared")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=10_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.model, options.minutes, options.clients, options.requests, options.seed)
    problems = check(found)
    found["wrong"] = len(found["wrong"])
    print(json.dumps(found, indent=1))
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
