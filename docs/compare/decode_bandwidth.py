"""How much of the memory bandwidth decoding one sequence uses: weights read per step over the step's time, against a plain read of
a 1 GB buffer by as many threads, measured alternately.

    python docs/compare/decode_bandwidth.py MODEL

Weights count as they lie in memory, once a step; keys and values are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

import torch

from kernels.cpu import _native
from kernels.cpu.threads import usable_cores
from server.config import EngineConfig
from server.engine.engine import build_engine
from server.engine_bench import greedy_request, random_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--threads", type=int, default=usable_cores()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="decode steps per round (default: 12)")
    options = parser.parse_args()

    num_tokens = options.rounds * options.steps + 1
    engine = build_engine(
        EngineConfig(
            model=options.model,
            max_model_len=num_tokens + 16,
            max_num_seqs=1,
            max_num_batched_tokens=64,
            kernel_backend="cpu",
            threads=options.threads,
        )
    )
    weights = engine.runner.decoder.weights
    nbytes = sum(layer.nbytes for layer in weights.layers) + weights.head.nbytes
    engine.submit(greedy_request("decode", random_prompt(random.Random(0), 16, engine.runner.vocab_size), num_tokens))
    engine.step()

    pool, buffer = _native.ThreadPool(options.threads), torch.ones(1 << 30, dtype=torch.uint8)
    rounds = []
    for _ in range(options.rounds):
        read = _native.measure_read_bandwidth(pool, buffer, 0.4)
        seconds = []
        for _ in range(options.steps):
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
        decode = nbytes / statistics.median(seconds)
        rounds.append({"read_gbs": read / 1e9, "decode_gbs": decode / 1e9, "share": decode / read})
        print(f"read {read / 1e9:6.1f} GB/s   decode {decode / 1e9:6.1f} GB/s   {decode / read:6.1%}", flush=True)
    share = statistics.median(entry["share"] for entry in rounds)
    print(f"{nbytes / 1e6:.0f} MB of weights a step; median share {share:.1%}")
    print(json.dumps({"weight_bytes": nbytes, "threads": options.threads, "share": share, "rounds": rounds}))


if __name__ == "__main__":
    main()
