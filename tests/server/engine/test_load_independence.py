"""The law on the real model, bitwise: a request's logits are the same alone, in a batch of mixed requests, with its prompt cut into
chunks, on one thread or two, with the prefix cache warm or cold, and after a preemption."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer

from server.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.types import GenerateRequest, SamplingParams
from tests.kernels.cpu_support import needs_native

Digests = dict[tuple[str, int], str]


@contextmanager
def recorded_logits(engine: Engine) -> Iterator[Digests]:
    """Digests of the bits of every logits row that is sampled from, by request and output index."""
    digests: Digests = {}
    apply_rules = engine.runner.sampler.apply_rules

    def recording(rows, logits):  # type: ignore[no-untyped-def]
        for row, values in zip(rows, logits, strict=True):
            key = (row.sequence.request_id, row.num_output_tokens)
            digest = hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
            assert digests.setdefault(key, digest) == digest
        return apply_rules(rows, logits)

    engine.runner.sampler.apply_rules = recording  # type: ignore[method-assign]
    try:
        yield digests
    finally:
        engine.runner.sampler.apply_rules = apply_rules  # type: ignore[method-assign]


@dataclass(frozen=True)
class Outcome:
    tokens: dict[str, list[int]]
    logits: Digests
    num_preemptions: int
    num_prefix_hits: int


def run(engine: Engine, requests: list[GenerateRequest], one_by_one: bool = False) -> Outcome:
    tokens: dict[str, list[int]] = {}
    preemptions = hits = 0
    with recorded_logits(engine) as logits:
        for batch in [[request] for request in requests] if one_by_one else [requests]:
            for request in batch:
                engine.submit(request)
            while engine.has_work():
                output = engine.step()
                engine.scheduler.block_manager.check()
                preemptions += output.stats.num_preemptions
                hits += output.stats.num_prefix_hits
                for event in output.events:
                    tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return Outcome(tokens, logits, preemptions, hits)


def mixed_requests(demo_model: Path, count: int, longest: int) -> list[GenerateRequest]:
    """Greedy and sampled, prompts of 1 to `longest` tokens, some of which begin alike."""
    text = Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode("\n".join(sorted(topics.values()))).ids
    requests = []
    for index in range(count):
        length = 1 + (index * 53) % longest
        start = 0 if index % 3 == 0 else 1000 * index
        temperature = 0.0 if index % 2 else 0.9
        sampling = SamplingParams(12, temperature=temperature, top_p=0.95, seed=index, ignore_eos=True)
        requests.append(GenerateRequest(f"r{index}", text[start : start + length], sampling, time.monotonic()))
    return requests


def check_law(build: Callable[..., Engine], requests: list[GenerateRequest]) -> None:
    cold = {"enable_prefix_caching": False}
    alone = run(build(**cold), requests, one_by_one=True)
    assert len({tuple(tokens) for tokens in alone.tokens.values()}) > len(requests) // 2

    def check(what: str, outcome: Outcome) -> None:
        assert outcome.tokens == alone.tokens, f"{what}: other tokens"
        assert outcome.logits == alone.logits, f"{what}: other bits"

    check("in a batch", run(build(**cold), requests))
    check("in chunks of 16", run(build(**cold, max_num_batched_tokens=16), requests))
    warm = build()
    run(warm, requests)
    again = run(warm, requests)
    assert again.num_prefix_hits > 0
    check("with a warm prefix cache", again)
    # A pool that holds the longest request and little more.
    small = run(build(**cold, small_pool=True), requests)
    assert small.num_preemptions > 0
    check("after preemptions", small)


def builder(demo_model: Path, backend: str, threads: int, longest: int, **options: str) -> Callable[..., Engine]:
    def build(small_pool: bool = False, **overrides: object) -> Engine:
        # The budget is set: its default follows from measured speed, and how often the small pool preempts from the budget.
        config = {
            "max_model_len": longest + 16,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 512,
            "kernel_backend": backend,
            "threads": threads,
        }
        engine = build_engine(EngineConfig(str(demo_model), **{**config, **options, **overrides}))  # type: ignore[arg-type]
        if small_pool:
            manager = engine.scheduler.block_manager
            for block in range(-(-(longest + 16) // 16), manager.num_blocks):
                del manager._free[block]
            manager.num_blocks = len(manager._free)
            manager._references = manager._references[: manager.num_blocks]
            manager._hashes = manager._hashes[: manager.num_blocks]
        return engine

    return build


@pytest.mark.slow
def test_reference(demo_model: Path) -> None:
    check_law(builder(demo_model, "reference", 0, 90), mixed_requests(demo_model, 6, 90))


@needs_native
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"cpu_activations": "int16", "lm_head_dtype": "fp16"}, marks=pytest.mark.slow),
        pytest.param({"kv_cache_dtype": "int8"}, marks=pytest.mark.slow),
    ],
)
def test_cpu(demo_model: Path, options: dict[str, str]) -> None:
    requests = mixed_requests(demo_model, 16, 330)
    try:
        check_law(builder(demo_model, "cpu", 2, 330, **options), requests)
        two = run(builder(demo_model, "cpu", 2, 330, **options)(), requests)
        one = run(builder(demo_model, "cpu", 1, 330, **options)(), requests)
    finally:
        torch.set_num_threads(1)
    assert two.tokens == one.tokens and two.logits == one.logits, "the number of threads changes bits"
