"""How a well-behaved client fares while others misbehave: `make abuse`.

    python -m tests.operate.abuse MODEL [--seconds 10] [--only TEXT] [--most 5]

Starts a server, and for each attack of `attacks.py` a process that carries it out, while a client with a key of its own asks for
the same short greedy answer over and over, on new connections. Fails when an answer is missing or differs, when one takes longer
than --most seconds, when an idle connection is never closed, or when a process of the server has ended. Prints a table, then a line
of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.operate.attacks import ATTACKS, MORE_SECONDS, NUM_IDLE, Target
from tests.operate.processes import process_tree
from tests.served import Server

GOOD, BAD = "good-client-0123456789", "bad-client-0123456789"
PROMPT = "The capital of France is"
NUM_TOKENS = 8
PAUSE = 0.1  # seconds between two requests of the good client


@dataclass(frozen=True)
class Row:
    """Seconds as the good client saw them."""

    attack: str
    num_requests: int
    median: float
    p99: float
    longest: float
    attacker_saw: dict[str, int]
    server_cut: dict[str, int]  # requests and connections, by reason


def raise_descriptor_limit() -> None:
    """To what the idle connections need, as far as this process may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_IDLE + 1000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        except ValueError:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def attack_process(name: str, host: str, port: int, seconds: float, results: Connection) -> None:
    raise_descriptor_limit()
    os.nice(5)  # the machine is shared: it is the server that is on trial
    target = Target(host, port, BAD, time.monotonic() + seconds)

    async def run() -> None:
        try:
            async with asyncio.timeout(seconds + 10 + MORE_SECONDS.get(name, 0)):
                await ATTACKS[name](target)
        except TimeoutError:
            pass

    asyncio.run(run())
    results.send(dict(target.answers))


class GoodClient:
    def __init__(self, url: str) -> None:
        self._url = url
        self.expected: str | None = None

    def ask(self) -> float:
        """Seconds of one request, on a connection of its own. Asserts that the answer is the usual one."""
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "seed": 1}
        begin = time.monotonic()
        answer = httpx.post(
            f"{self._url}/v1/completions", json=body, headers={"Authorization": f"Bearer {GOOD}"}, timeout=60
        )
        seconds = time.monotonic() - begin
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        text = answer.json()["choices"][0]["text"]
        self.expected = self.expected or text
        assert text == self.expected, f"another answer: {text!r}, not {self.expected!r}"
        return seconds

    def ask_while(self, is_going_on: object) -> list[float]:
        assert callable(is_going_on)
        seconds = []
        while is_going_on():
            seconds.append(self.ask())
            time.sleep(PAUSE)
        return seconds


def run_attack(name: str, server: Server, client: GoodClient, seconds: float) -> Row:
    parts = urlsplit(server.url)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=attack_process, args=(name, parts.hostname, parts.port, seconds, theirs), daemon=True
    )
    before = refusals(server)
    process.start()
    theirs.close()
    taken = client.ask_while(process.is_alive)
    saw = ours.recv() if ours.poll(1) else {}
    process.join(10)
    return row(name, taken, saw, {reason: count - before[reason] for reason, count in refusals(server).items()})


def row(name: str, taken: list[float], saw: dict[str, int], cut: dict[str, int]) -> Row:
    taken = sorted(taken)
    cut = {reason: count for reason, count in cut.items() if count}
    return Row(name, len(taken), taken[len(taken) // 2], taken[int(len(taken) * 0.99)], taken[-1], saw, cut)


def refusals(server: Server) -> dict[str, int]:
    """What the server has cut or turned away so far, by reason."""
    text = server.client.get("/metrics").text
    found = re.findall(r'^awqserve_http_refusals_total\{.*reason="(\w+)".*\} (\S+)$', text, re.MULTILINE)
    return {reason: int(float(count)) for reason, count in found}


def wait_until_quiet(server: Server, seconds: float = 90.0) -> None:
    """Until nothing of the attack is left: no requests, no connections but the one that asks."""
    deadline = time.monotonic() + seconds
    names = ("awqserve_num_requests_running", "awqserve_num_requests_waiting", "awqserve_num_prompt_tokens_waiting")
    while any(server.metric(name) for name in names) or server.metric("awqserve_http_connections") > 2:
        left = {name: server.metric(name) for name in (*names, "awqserve_http_connections")}
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)
    assert server.metric("awqserve_kv_cache_usage_perc") == 0


def server_processes(server: Server) -> set[int]:
    """The API process and the engine; the grammars' process may come and go."""
    return set(process_tree(server.process.pid).values())


def run(model: Path, seconds: float, only: str, most: float, flags: tuple[str, ...] = ()) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(f"good:{GOOD}\nbad:{BAD}\n")
        limits = ["--max-model-len", "1024", "--key-concurrent-requests", "4"]
        limits += ["--header-timeout", "5", "--body-timeout", "5", "--send-timeout", "5"]
        with Server(model, "--api-key-file", str(keys), *limits, *flags) as server:
            server.client.headers["Authorization"] = f"Bearer {GOOD}"
            client = GoodClient(server.url)
            client.ask()
            before = server_processes(server)
            quiet_until = time.monotonic() + seconds
            rows = [row("none", client.ask_while(lambda: time.monotonic() < quiet_until), {}, {})]
            print_row(rows[0])
            for name in ATTACKS:
                if only in name:
                    rows.append(run_attack(name, server, client, seconds))
                    print_row(rows[-1])
                    wait_until_quiet(server)
                    assert server.process.poll() is None, "the server has ended:\n" + "".join(server.lines)
                    assert rows[-1].longest <= most, f"{name}: {rows[-1].longest:.2f} s for a well-behaved client"
                    assert not rows[-1].attacker_saw.get("never closed"), f"{name}: connections are never closed"
            assert before <= server_processes(server), "a process of the server was started anew"
            assert not [line for line in server.lines if "Traceback" in line], "".join(server.lines)
    return rows


def print_row(found: Row) -> None:
    saw = ", ".join(f"{status} x{number}" for status, number in sorted(found.attacker_saw.items()))
    if found.server_cut:
        saw += "; cut: " + ", ".join(f"{reason} x{number}" for reason, number in sorted(found.server_cut.items()))
    figures = f"{found.median * 1e3:6.0f} {found.p99 * 1e3:6.0f} {found.longest * 1e3:6.0f}"
    print(f"{found.attack:40} {found.num_requests:5} {figures}   {saw}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", default="", help="attacks with this in their name")
    parser.add_argument("--most", type=float, default=5, help="seconds that an answer may take")
    options = parser.parse_args()
    print(f"{'attack':40} {'asked':>5} {'median':>6} {'p99':>6} {'longest':>6} ms   what the attacker got")
    rows = run(options.model, options.seconds, options.only, options.most)
    print(json.dumps([asdict(found) for found in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
