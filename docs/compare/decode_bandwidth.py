"""How much of the memory bandwidth decoding uses: weights read per step over the step's time, against a plain read of a 1 GB
buffer by as many threads, measured alternately.

    python docs/compare/decode_bandwidth.py MODEL [--batch 8]

Weights count as they lie in memory, once a step, and of a mixture's experts those that a step's tokens go to; keys and values are
left out.
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
from server.models.decoder import DecoderWeights
from server.models.mlp import MixtureMlp


def fixed_nbytes(weights: DecoderWeights) -> tuple[int, int]:
    """Bytes that every step reads, and those of one expert (0 without)."""
    total, expert = sum(layer.nbytes for layer in weights.layers) + weights.head.nbytes, 0
    for layer in weights.layers:
        if isinstance(layer.mlp, MixtureMlp):
            sizes = layer.mlp.experts.expert_nbytes
            total, expert = total - sum(sizes), sizes[0]
    return total, expert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--threads", type=int, default=usable_cores()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="decode steps per round (default: 12)")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together (default: 1)")
    options = parser.parse_args()

    num_tokens = options.rounds * options.steps + 1
    engine = build_engine(
        EngineConfig(
            model=options.model,
            max_model_len=num_tokens + options.batch + 16,
            max_num_seqs=options.batch,
            max_num_batched_tokens=64,
            kernel_backend="cpu",
            threads=options.threads,
        )
    )
    fixed, expert = fixed_nbytes(engine.runner.decoder.weights)
    program = engine.runner.program.native  # type: ignore[attr-defined]
    rng = random.Random(0)
    for index in range(options.batch):
        prompt = random_prompt(rng, 16, engine.runner.vocab_size)
        engine.submit(greedy_request(f"decode {index}", prompt, num_tokens + options.batch))
    for _ in range(options.batch):  # prompts may take several steps
        engine.step()

    pool, buffer = _native.ThreadPool(options.threads), torch.ones(1 << 30, dtype=torch.uint8)
    rounds = []
    for _ in range(options.rounds):
        read = _native.measure_read_bandwidth(pool, buffer, 0.4)
        seconds, experts = [], program.num_experts_read
        for _ in range(options.steps):
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
        nbytes = fixed + expert * (program.num_experts_read - experts) / options.steps
        step = statistics.median(seconds)
        rounds.append(
            {
                "read_gbs": read / 1e9,
                "decode_gbs": nbytes / step / 1e9,
                "share": nbytes / step / read,
                "step_bytes": nbytes,
                "tokens_per_second": options.batch / step,
            }
        )
        print(
            f"read {read / 1e9:6.1f} GB/s   decode {nbytes / step / 1e9:6.1f} GB/s   {nbytes / step / read:6.1%}   "
            f"{nbytes / 1e6:6.0f} MB a step   {options.batch / step:6.1f} tokens/s",
            flush=True,
        )
    middle = {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
    print(f"{middle['step_bytes'] / 1e6:.0f} MB of weights a step; median share {middle['share']:.1%}")
    print(json.dumps({"batch": options.batch, "threads": options.threads, **middle, "rounds": rounds}))


if __name__ == "__main__":
    main()
