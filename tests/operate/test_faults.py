"""Real servers in processes of their own: stopped, reloaded, starved of descriptors and disk, and their engines killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from quantizer.export import write_sums
from server.engine.client import EngineState
from tests.operate import chaos
from tests.operate.processes import engine_pid
from tests.served import Server
from tests.server.fakes import echo_engine, served_edge
from tests.tiny_models import add_tokenizer, make_tiny_model

FLAGS = ("--kernel-backend", "reference", "--kv-cache-memory-bytes", "16M", "--threads", "1")
BODY = {"prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def tiny(directory: Path, seed: int) -> Path:
    make_tiny_model(directory, "llama", torch.float16, seed=seed)
    add_tokenizer(directory)
    write_sums(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture
def server(model: Path) -> Iterator[Server]:
    with Server(model, *FLAGS, "--drain-timeout", "30") as running:
        yield running


def test_a_drain_under_load_loses_nothing(server: Server) -> None:
    """SIGTERM while streams and whole answers are under way: all end as they should, new ones are refused; then exit code 0."""
    body = BODY | {"max_tokens": 200}
    whole = server.complete(**body)["choices"][0]["text"]
    begun = threading.Barrier(9)

    def streamed(index: int) -> str:
        text = ""
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
            begun.wait(30)
            for line in answer.iter_lines():
                text += "".join(re.findall(r'"text":"((?:[^"\\]|\\.)*)"', line))
        assert line == "data: [DONE]" or line == ""
        return text

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(streamed, index) for index in range(8)]
        answers = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60) for _ in range(6)]
        begun.wait(30)
        server.wait_for_metric("awqserve_num_requests_running", 14)
        server.process.send_signal(signal.SIGTERM)
        texts = {stream.result(60) for stream in streams}
        assert all(answer.result(60).json()["choices"][0]["text"] == whole for answer in answers)
    assert len(texts) == 1 and len(texts.pop()) >= len(whole)
    assert server.process.wait(30) == 0


@pytest.mark.slow
def test_a_reload_takes_what_is_there_now_and_refuses_what_is_damaged(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        tiny(tmp_path / name, seed)
    link = tmp_path / "model"
    link.symlink_to("one")
    with Server(link, *FLAGS) as server:
        first = server.complete(**BODY)["choices"][0]["token_ids"]

        def reload_to(name: str, line: str) -> list[int]:
            link.unlink()
            link.symlink_to(name)
            num_lines = len(server.lines)
            server.process.send_signal(signal.SIGHUP)
            wait_for_line(server, line, num_lines)
            return server.complete(**BODY)["choices"][0]["token_ids"]

        second = reload_to("two", "reloaded in")
        assert second != first
        assert reload_to("one", "reloaded in") == first
        damaged = shutil.copytree(tmp_path / "two", tmp_path / "damaged")
        content = bytearray((damaged / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (damaged / "model.safetensors").write_bytes(content)
        assert reload_to("damaged", "not reloaded, the model that is served stays: model.safetensors: damaged") == first
        (damaged / "model.safetensors").write_bytes(content[:-5])
        assert reload_to("damaged", "model.safetensors: not a complete safetensors file") == first
        (damaged / "tokenizer.json").write_text("{")
        assert reload_to("damaged", "stays:") == first
        # Whole, but not what its config says: only the load finds out, and the former model is started again.
        foreign = shutil.copytree(tmp_path / "two", tmp_path / "foreign")
        config = (foreign / "config.json").read_text()
        (foreign / "config.json").write_text(re.sub(r'"intermediate_size": \d+', '"intermediate_size": 64', config))
        num_lines = len(server.lines)
        link.unlink()
        link.symlink_to("foreign")
        server.process.send_signal(signal.SIGHUP)
        wait_for_line(server, "the engine is up again", num_lines)
        assert server.complete(**BODY)["choices"][0]["token_ids"] == first


def test_an_engine_that_hangs_does_not_outlive_its_server(model: Path) -> None:
    server = Server(model, *FLAGS)
    pid = engine_pid(server.process.pid)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    server.process.kill()
    server.process.wait(10)
    server.client.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/maps").exists() and Path(f"/proc/{pid}/maps").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_line(server: Server, part: str, begin: int) -> None:
    deadline = time.monotonic() + 60
    while not any(part in line for line in server.lines[begin:]):
        assert time.monotonic() < deadline and server.process.poll() is None, "".join(server.lines)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_crash_loop_ends_with_a_message_and_an_exit_code(tmp_path: Path) -> None:
    directory = tiny(tmp_path / "model", 3)
    server = Server(directory, *FLAGS)
    server.complete(**BODY)
    shutil.rmtree(directory)
    pid = engine_pid(server.process.pid)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert server.process.wait(90) == 1
    server.client.close()
    log = "".join(server.lines)
    assert "5 crashes in a row" in log and "awq-serve: error: the engine is down" in log


@pytest.mark.slow
def test_without_descriptors_it_neither_spins_nor_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        server = Server(model, *FLAGS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        server.complete(**BODY)
        server.client.close()

        def processor_seconds() -> float:
            fields = Path(f"/proc/{server.process.pid}/stat").read_text().rsplit(")")[-1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        address = ("127.0.0.1", httpx.URL(server.url).port or 0)
        connections = [socket.create_connection(address) for _ in range(150)]
        time.sleep(0.5)
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) >= 60
        before = processor_seconds()
        time.sleep(2)
        assert processor_seconds() - before < 0.5
        for connection in connections:
            connection.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=10).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


@pytest.mark.slow
def test_a_full_disk_ends_a_quantization_with_one_line_and_it_can_go_on(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail in the same place, with another errno."""
    source, out = tiny(tmp_path / "source", 4), tmp_path / "out"
    command = [sys.executable, "-m", "quantizer", str(source), str(out), "--group-size", "32", "--effort", "fast"]
    begun = subprocess.run(
        command, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )  # fmt: skip
    assert begun.returncode == 1, begun.stderr
    assert "Traceback" not in begun.stderr and "File too large" in begun.stderr.splitlines()[-1]
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=out, check=True, capture_output=True)


@pytest.mark.slow
def test_an_engine_that_is_killed_again_and_again_loses_nothing(demo_model: Path) -> None:
    """`make chaos` in short."""
    flags = ("--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "200M")
    with Server(demo_model, *flags) as server:
        tally = asyncio.run(chaos.run(server, num_faults=3, num_clients=8, seed=1))
        assert not chaos.violations(server, tally, 3, back_within=60.0)
        assert tally.outcomes["200"] and tally.outcomes["hung"] == 0


def test_a_jump_of_the_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are those of the monotonic clock: a request's deadlines, latencies and the watchdog do not see the jump."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    with served_edge(echo_engine(step_seconds=0.005)) as (url, edge):
        for jump in (86_400.0, -7 * 86_400.0, 10 * 365 * 86_400.0):
            with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "The dog", "max_tokens": 60, "stream": True,
                                                                      "include_metrics": True}) as answer:  # fmt: skip
                lines = answer.iter_lines()
                next(lines)
                offset[0] = jump
                *_, metrics, _ = [line for line in lines if line]
            assert 0 <= json.loads(metrics.removeprefix("data: "))["metrics"]["generation_time_ms"] < 20_000
        text = httpx.get(f"{url}/metrics").text
        [seconds] = re.findall(r'awqserve_e2e_request_latency_seconds_sum{engine="0",model_name="echo"} (\S+)', text)
        assert 0 < float(seconds) < 60 and edge.client.state is EngineState.READY
