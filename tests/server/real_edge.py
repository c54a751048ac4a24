"""The application over a real engine with a tiny random model, called in process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from prometheus_client import CollectorRegistry

from server.api.app import create_app
from server.api.context import ApiContext
from server.config import EngineConfig, NgramSpeculation
from server.engine.client import EngineClient
from server.engine.engine import build_engine
from server.engine.process import thread_engine
from server.grammar import GrammarService
from server.metrics import MetricsRecorder
from server.text import Tokenizer
from tests.tiny_models import add_tokenizer, make_tiny_model

VOCAB_SIZE = 320


def tiny_checkpoint(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    make_tiny_model(directory, "llama", dtype)
    add_tokenizer(directory)
    return directory


@asynccontextmanager
async def real_edge(
    model: Path,
    backend: str = "reference",
    kv_bytes: int = 2**24,
    speculative: NgramSpeculation | None = None,
    **context_fields: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    config = EngineConfig(
        str(model),
        max_model_len=512,
        kernel_backend=backend,
        max_num_seqs=8,
        kv_cache_memory_bytes=kv_bytes,
        threads=1,
        speculative=speculative,
    )
    client = EngineClient(lambda epoch: thread_engine(lambda: build_engine(config, epoch), epoch))
    info = await client.start()
    recorder = MetricsRecorder(CollectorRegistry(), "tiny", info)
    client.observer = recorder
    grammars = GrammarService(model / "tokenizer.json")
    context = ApiContext(
        engine=client,
        tokenizer=Tokenizer.from_file(model / "tokenizer.json"),
        model_names=("tiny",),
        vocab_size=VOCAB_SIZE,
        render_metrics=recorder.render,
        created=1_700_000_000,
        max_request_bytes=2**20,
        grammars=grammars,
        **context_fields,
    )
    transport = httpx.ASGITransport(app=create_app(context), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge", timeout=60) as http:
        try:
            yield http
        finally:
            await client.stop()
            grammars.close()


async def completion(http: httpx.AsyncClient, prompt: Any, **fields: Any) -> dict[str, Any]:
    """Greedy, of 8 tokens, ids included, unless `fields` say otherwise; asserts that it succeeded."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | fields
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()
