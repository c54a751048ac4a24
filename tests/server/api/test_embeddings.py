"""/v1/embeddings: transformers' hidden states, pooled; the same whatever shares the steps; through the official client."""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from server.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.types import FinishReason, GenerateRequest, Pooling, PoolRequest, SamplingParams
from tests.kernels.cpu_support import needs_native
from tests.server.fakes import echo_engine, running_edge
from tests.server.real_edge import completion, real_edge, tiny_checkpoint
from tests.tiny_models import TINY_MODELS, load_reference, make_tiny_model

PROMPTS = [[3 + (7 * i * length) % 300 for i in range(length)] for length in (1, 5, 33, 64, 17, 40)]
KV_BYTES = 2**22


def engine_of(model: Path, backend: str = "reference", **options: Any) -> Engine:
    options = {"max_model_len": 64, "max_num_seqs": 8, "kv_cache_memory_bytes": KV_BYTES, "threads": 1} | options
    return build_engine(EngineConfig(str(model), kernel_backend=backend, **options))


def embed(engine: Engine, pooling: Pooling, beside: tuple[GenerateRequest, ...] = ()) -> tuple[list[list[float]], int]:
    """The embeddings of PROMPTS, all submitted at once, and how often a sequence was preempted."""
    for request in beside:
        engine.submit(request)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(PoolRequest(str(index), prompt, pooling, time.monotonic()))
    embeddings: dict[str, list[float]] = {}
    num_preemptions = 0
    while engine.has_work():
        output = engine.step()
        engine.scheduler.block_manager.check()
        num_preemptions += output.stats.num_preemptions
        for event in output.events:
            if event.embedding is not None:
                assert event.finish_reason is FinishReason.STOP and not event.token_ids
                embeddings[event.request_id] = event.embedding
    assert engine.scheduler.block_manager.counts.used == 0
    return [embeddings[str(index)] for index in range(len(PROMPTS))], num_preemptions


@torch.no_grad()
def expected(model: Path, pooling: Pooling) -> list[list[float]]:
    reference = load_reference(model)
    pooled = []
    for prompt in PROMPTS:
        states = reference.base_model(torch.tensor([prompt])).last_hidden_state[0]
        pooled.append(states[-1] if pooling is Pooling.LAST else states.mean(0))
    return [(state / state.norm()).tolist() for state in pooled]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_equal_to_transformers(tmp_path: Path, kind: str) -> None:
    model = make_tiny_model(tmp_path, kind)
    engine = engine_of(model, max_num_batched_tokens=16)  # prompts in chunks, several to a step
    for pooling in Pooling:
        found, _ = embed(engine, pooling)
        np.testing.assert_allclose(found, expected(model, pooling), atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("pooling", Pooling)
def test_independent_of_what_shares_the_steps(tmp_path: Path, backend: str, pooling: Pooling) -> None:
    model = make_tiny_model(tmp_path, "llama")
    greedy = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    beside = tuple(GenerateRequest(f"g{n}", PROMPTS[2][:n], greedy, time.monotonic()) for n in (4, 8, 12))
    whole, num_preemptions = embed(engine_of(model, backend, max_num_seqs=1), pooling)
    assert num_preemptions == 0
    np.testing.assert_allclose(whole, expected(model, pooling), atol=1e-4 if backend == "reference" else 0.02)
    pool = 112 * {"reference": 768, "cpu": 384}[backend]  # 112 tokens: keys and values of 2 heads of 16 in 3 layers
    # Bit for bit: in small chunks, beside requests that generate, in a pool that cannot hold them all, and with what that cached.
    engine = engine_of(model, backend, max_num_batched_tokens=16, block_size=16, kv_cache_memory_bytes=pool)
    crowded, num_preemptions = embed(engine, pooling, beside)
    assert crowded == whole
    assert num_preemptions > 0
    again, _ = embed(engine, pooling)
    assert again == whole


def test_official_client(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path)

    async def check() -> None:
        async with real_edge(model) as http:
            client = openai.AsyncOpenAI(base_url="http://edge/v1", api_key="unused", http_client=http, max_retries=0)
            one = await client.embeddings.create(model="tiny", input="the quick brown fox")
            ids = (await http.post("/tokenize", json={"prompt": "the quick brown fox"})).json()["tokens"]
            assert one.usage.prompt_tokens == one.usage.total_tokens == len(ids)
            [vector] = [item.embedding for item in one.data]
            assert len(vector) == 64 and abs(np.linalg.norm(vector) - 1) < 1e-6
            assert one.object == "list" and one.model == "tiny" and one.data[0].object == "embedding"
            plain = await client.embeddings.create(model="tiny", input=ids, encoding_format="float")
            np.testing.assert_allclose(plain.data[0].embedding, vector, atol=1e-7)
            body = {"input": [ids], "encoding_format": "base64"}
            encoded = (await http.post("/v1/embeddings", json=body)).json()["data"][0]["embedding"]
            assert np.frombuffer(base64.b64decode(encoded), "<f4").tolist() == np.float32(vector).tolist()

            texts = [f"{word} dog" for word in ("the", "lazy", "over", "that")] * 8
            many, answer = await asyncio.gather(
                client.embeddings.create(model="tiny", input=texts, extra_body={"pooling": "mean"}),
                completion(http, "the fox"),
            )
            assert [item.index for item in many.data] == list(range(32)) and answer["choices"]
            assert many.data[0].embedding == many.data[4].embedding != many.data[1].embedding
            whole = await client.embeddings.create(model="tiny", input=[[5] * 512])  # the context, to its last token
            assert whole.usage.prompt_tokens == 512
            metrics = (await http.get("/metrics")).text
            assert (
                'awqserve_request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 36.0' in metrics
            ), metrics

    asyncio.run(check())


def test_what_is_refused() -> None:
    async def check() -> None:
        async with running_edge(echo_engine(max_model_len=32)) as edge:
            for fields, param in (
                ({}, "input"),
                ({"input": ""}, "input"),
                ({"input": []}, "input"),
                ({"input": ["dog", 3]}, "input.1"),
                ({"input": [[1, 2], [400]]}, "input"),
                ({"input": [5] * 33}, "input"),
                ({"input": "dog", "dimensions": 8}, "dimensions"),
                ({"input": "dog", "encoding_format": "int8"}, "encoding_format"),
                ({"input": "dog", "pooling": "cls"}, "pooling"),
                ({"input": "dog", "priority": 1}, "priority"),
                ({"input": "dog", "temperature": 0}, "temperature"),
            ):
                answer = await edge.http.post("/v1/embeddings", json=fields)
                assert answer.status_code == 400, fields
                assert answer.json()["error"]["param"] == param, answer.text
            missing = await edge.http.post("/v1/embeddings", json={"input": "dog", "model": "other"})
            assert missing.status_code == 404
            assert not edge.engine.submitted

    asyncio.run(check())
