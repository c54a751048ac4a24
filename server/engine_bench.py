"""`python -m server.engine_bench MODEL`: what the engine does without HTTP around it, and where a step's time goes.

Prefill of one prompt and decoding at several batch sizes, each the median of several repetitions, in tokens per second; then, for
back ends that can tell, the share of each kind of op, and of Python around the recorded program. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from kernels.backend import Backend, SampledRows
from kernels.batch import SamplingBatch
from server.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.types import AbortReason, GenerateRequest, SamplingParams

SAMPLING_SHARE = "sampling"
"""Choosing tokens from the logits, the call from Python included."""
PYTHON_SHARE = "python and dispatch"
"""The part of a step outside both: scheduling, filling buffers, events."""
TORCH_SHARE = "of that, torch ops"
"""What is spent in torch's own ops, by torch's profiler, whose cost per op counts as the op's: an upper bound."""


@dataclass(slots=True)
class DecodeResult:
    """Steps at one batch size. `shares` are of the step's wall time."""

    batch_size: int
    tokens_per_second: float
    milliseconds_per_step: float
    shares: dict[str, float] = field(default_factory=dict)


def random_prompt(generator: random.Random, length: int, vocabulary: int) -> list[int]:
    return [generator.randrange(vocabulary) for _ in range(length)]


def measure_prefill(engine: Engine, length: int, vocabulary: int, repetitions: int) -> float:
    """Tokens per second of a distinct random prompt, first submitted to first token."""
    generator = random.Random(0)
    seconds = []
    for repetition in range(repetitions + 1):
        prompt = random_prompt(generator, length, vocabulary)
        started = time.perf_counter()
        engine.submit(greedy_request(f"prefill-{repetition}", prompt, 1))
        while engine.has_work():
            engine.step()
        seconds.append(time.perf_counter() - started)
    return length / statistics.median(seconds[1:])


def measure_decode(
    engine: Engine, batch_size: int, context: int, vocabulary: int, steps: int, profile: bool
) -> DecodeResult:
    """The median step with `batch_size` sequences that all decode, each with `context` tokens and more behind it."""
    generator = random.Random(batch_size)
    for index in range(batch_size):
        prompt = random_prompt(generator, context, vocabulary)
        engine.submit(greedy_request(f"decode-{batch_size}-{profile}-{index}", prompt, 10 * steps + 200))
    running = engine.scheduler.running
    while len(running) < batch_size or not all(sequence.is_decoding for sequence in running):
        engine.step()
    shares: dict[str, float] = {}
    seconds: list[float] = []

    def run() -> None:
        for _ in range(steps):
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)

    run()
    seconds.clear()
    program = engine.runner.program
    if profile and hasattr(program, "profile"):
        with timed_sampling(engine.runner.backend) as sampling:
            by_kind = program.profile(run)
        by_kind[SAMPLING_SHARE] = sum(sampling)
        total = sum(seconds)
        shares = {kind: value / total for kind, value in sorted(by_kind.items(), key=lambda item: -item[1])}
        shares[PYTHON_SHARE] = 1 - sum(shares.values())
        shares[TORCH_SHARE] = torch_share(run)
    else:
        run()
    for sequence in list(running):
        engine.abort(sequence.request_id, AbortReason.CLIENT)
    engine.step()
    median = statistics.median(seconds)
    return DecodeResult(batch_size, batch_size / median, median * 1e3, shares)


@contextlib.contextmanager
def timed_sampling(backend: Backend) -> Iterator[list[float]]:
    """The seconds of each call of the back end's sampler meanwhile."""
    sample, seconds = backend.sample, list[float]()

    def timed(logits: torch.Tensor, sampling: SamplingBatch) -> SampledRows:
        started = time.perf_counter()
        result = sample(logits, sampling)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(backend, "sample", timed)  # noqa: B010  (mypy knows methods as unassignable)
    try:
        yield seconds
    finally:
        delattr(backend, "sample")


def torch_share(run: Callable[[], None]) -> float:
    """Share of the time of `run` that torch's own CPU ops take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()
        run()
        microseconds = (time.perf_counter() - started) * 1e6
    ops = (event for event in profile.key_averages() if event.key.startswith("aten::"))
    return sum(event.self_cpu_time_total for event in ops) / microseconds


def greedy_request(request_id: str, prompt: list[int], max_tokens: int) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(request_id, prompt, sampling, time.monotonic())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m server.engine_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--kernel-backend", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores available")
    parser.add_argument("--cpu-activations", default="int8", choices=("int8", "int16"))
    parser.add_argument("--lm-head-dtype", default="auto", choices=("auto", "int8", "int4", "fp16"))
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill (default: 512)")
    parser.add_argument("--context", type=int, default=128, help="tokens before the decodes (default: 128)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=48, help="decode steps measured per batch size (default: 48)")
    parser.add_argument("--repetitions", type=int, default=5, help="prefills measured (default: 5)")
    parser.add_argument("--profile", action="store_true", help="also show where a decode step's time goes")
    options = parser.parse_args(arguments)

    largest = max(options.prompt, options.context + 20 * options.steps + 400)
    started = time.perf_counter()
    engine = build_engine(
        EngineConfig(
            model=options.model,
            max_model_len=largest,
            max_num_seqs=max(options.batch_sizes),
            max_num_batched_tokens=max(512, *options.batch_sizes),
            enable_prefix_caching=False,
            kernel_backend=options.kernel_backend,
            threads=options.threads,
            kv_cache_dtype=options.kv_cache_dtype,
            cpu_activations=options.cpu_activations,
            lm_head_dtype=options.lm_head_dtype,
        )
    )
    load_seconds = time.perf_counter() - started
    vocabulary = engine.runner.vocab_size
    prefill = measure_prefill(engine, options.prompt, vocabulary, options.repetitions)
    decodes = [
        measure_decode(engine, batch_size, options.context, vocabulary, options.steps, options.profile)
        for batch_size in options.batch_sizes
    ]
    _print(options, engine, load_seconds, prefill, decodes)


def _print(
    options: argparse.Namespace, engine: Engine, load_seconds: float, prefill: float, decodes: list[DecodeResult]
) -> None:
    print(f"{options.model}: {engine.info.backend} kernels, loaded in {load_seconds:.2f} s")
    print(f"{'prefill of ' + str(options.prompt):<24}{prefill:>10.1f} tokens/s")
    for result in decodes:
        print(
            f"{'decode, batch ' + str(result.batch_size):<24}{result.tokens_per_second:>10.1f} tokens/s"
            f"{result.milliseconds_per_step:>10.2f} ms/step"
        )
        for kind, share in result.shares.items():
            print(f"    {kind:<24}{share:>8.1%}")
    print(
        json.dumps(
            {
                "model": options.model,
                "backend": engine.info.backend,
                "load_seconds": round(load_seconds, 3),
                "prefill_tokens": options.prompt,
                "prefill_tokens_per_second": round(prefill, 1),
                "decode": [asdict(result) for result in decodes],
            }
        )
    )


if __name__ == "__main__":
    main()
