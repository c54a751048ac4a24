"""A request whose numbers are no numbers ends with an error, and leaves nothing behind that others would meet: neither in its
steps, nor in the blocks that it used, nor in the prefix cache. On every back end that runs here."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.types import FinishReason, GenerateRequest, Pooling, PoolRequest, SamplingParams, TokenEvent
from tests.kernels.cpu_support import needs_native
from tests.server.engine.fake_model import run_to_end
from tests.tiny_models import make_tiny_model

POISON = 300  # a token whose embedding is NaN
NUM_BLOCKS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_model(tmp_path_factory.mktemp("nan"), "llama-untied-biased", torch.float16)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    (directory / "tokenizer.json").write_text("{}")  # grammars are not used
    return directory


def make_engine(model: Path, backend: str) -> Engine:
    config = EngineConfig(str(model), max_model_len=64, max_num_seqs=6, kernel_backend=backend, threads=1, block_size=8)
    probe = build_engine(config)
    size = probe.runner.backend.kv_block_nbytes(kv_spec(probe))
    return build_engine(
        EngineConfig(
            str(model), max_model_len=48, max_num_seqs=6, kernel_backend=backend, threads=1, block_size=8,
            kv_cache_memory_bytes=size * NUM_BLOCKS,
        )
    )  # fmt: skip


def kv_spec(engine: Engine):  # type: ignore[no-untyped-def]
    from kernels.backend import KVCacheSpec

    config = engine.runner.decoder.config
    return KVCacheSpec(config.num_layers, 1, 8, config.num_kv_heads, config.head_dim, "auto")


def request(name: str, prompt: list[int], temperature: float = 0.0, **fields: object) -> GenerateRequest:
    sampling = SamplingParams(6, temperature=temperature, seed=7, ignore_eos=True, **fields)  # type: ignore[arg-type]
    return GenerateRequest(name, prompt, sampling, time.monotonic())


PROMPTS = {f"innocent-{index}": [index + 5, 40 + index, 7, 90, 12, 33, 61, 8, index + 20] for index in range(3)}


def answers(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {name: [token for event in of_one for token in event.token_ids] for name, of_one in events.items()}


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_what_is_not_finite_ends_alone(model: Path, backend: str) -> None:
    engine = make_engine(model, backend)
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, temperature=0.0 if name.endswith("0") else 0.9))
    expected = answers(run_to_end(engine))
    shared = [5, 40, 7, 90]  # a block that an innocent prompt begins with too
    poisons = {
        "greedy": request("greedy", [*shared, POISON, 8, 9, 10, 11, 12, 13]),
        "sampled": request("sampled", [POISON] * 9, temperature=1.0),
        "ruled": request("ruled", [3, POISON], allowed_token_ids=(5, 6), presence_penalty=0.5),
        "scored": request("scored", [3, 4, POISON], num_logprobs=2, num_prompt_logprobs=1),
    }
    for round_number in range(3):
        for poison in poisons.values():
            engine.submit(poison)
        pooled = PoolRequest("pooled", [3, POISON, 5], Pooling.MEAN, time.monotonic())
        engine.submit(pooled)
        for name, prompt in PROMPTS.items():
            engine.submit(request(name, prompt, temperature=0.0 if name.endswith("0") else 0.9))
        events = run_to_end(engine)
        for name in (*poisons, "pooled"):
            [event] = events[name]
            assert event.finish_reason is FinishReason.ERROR and event.is_non_finite, name
            assert event.error is not None and "not finite" in event.error and not event.token_ids
        assert {name: tokens for name, tokens in answers(events).items() if name in PROMPTS} == expected, round_number


def test_what_was_not_finite_is_not_found_in_the_prefix_cache(model: Path) -> None:
    engine = make_engine(model, "reference")
    prompt = [5, 40, POISON, 90, 8, 9, 10, 11, 12, 13]
    for name in ("a", "b"):
        engine.submit(request(name, prompt))
        [event] = run_to_end(engine)[name]
        assert event.is_non_finite and event.num_cached_tokens == 0
        engine.scheduler.block_manager.check()
