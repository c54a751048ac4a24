"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

START_TIMEOUT = 120.0


class Server:
    """`python -m server MODEL FLAGS` on a free port; a context manager that stops it with SIGTERM and checks how it went."""

    def __init__(self, model: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "server", str(model), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(START_TIMEOUT) or not self.url:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            ready = re.search(r"is ready: .* at (http://\S+)", line)
            if ready:
                self.url = ready.group(1)
                self._ready.set()
        self._ready.set()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.process.terminate()
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("the server did not stop:\n" + "".join(self.lines)) from None
        self._reader.join(5)
        assert code == 0, f"exit code {code}:\n" + "".join(self.lines)

    def complete(self, prompt: object, **fields: object) -> dict:
        """One completion; asserts that it succeeded."""
        response = self.client.post("/v1/completions", json={"prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = self.client.get("/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def wait_for_metric(self, name: str, value: float, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}, after {seconds} s"
            time.sleep(0.05)
