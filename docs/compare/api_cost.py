"""What serving costs beside computing: processor seconds of the API process and of the engine under a streamed load.

`python docs/compare/api_cost.py MODEL [--concurrency 32]` starts a server, lets `awq-bench` load it, and reads both processes'
times from /proc before and after. The load generator's own time is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def engine_of(server: int) -> int:
    """The child that computes: the one that has used most of its time."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return max(map(int, children), key=cpu_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=96)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    options = parser.parse_args()
    command = [sys.executable, "-m", "server", options.model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        url = next(match[1] for line in server.stdout if (match := re.search(r"is ready: .* at (http://\S+)", line)))
        bench = [sys.executable, "-m", "server.bench", url, "--input-len", str(options.input_len)]
        bench += ["--output-len", str(options.output_len), "--concurrency", str(options.concurrency)]
        subprocess.run([*bench, "--num-prompts", "8", "--seed", "1"], check=True, stdout=subprocess.DEVNULL)
        pids = server.pid, engine_of(server.pid)
        before = [cpu_seconds(pid) for pid in pids]
        subprocess.run([*bench, "--num-prompts", str(options.num_prompts), "--seed", "2"], check=True)
        api, engine = (cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True))
        print(f"API process {api:.2f} s, engine {engine:.2f} s of processor time: {api / engine:.1%}")
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
