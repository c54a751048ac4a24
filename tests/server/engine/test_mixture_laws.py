"""Mixtures of experts served from quantized checkpoints: the law of load independence, bitwise, and how far the native kernels'
predictions are from the reference's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from kernels.backend import BackendOptions, KVCacheSpec
from kernels.choice import create_backend
from server.model_config import load_model_config
from server.models.loader import load_decoder
from server.types import GenerateRequest, SamplingParams
from tests.awq_checkpoints import make_awq_checkpoint
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables
from tests.kernels.cpu_support import needs_native
from tests.server.engine.test_load_independence import builder, check_law
from tests.server.models.test_decoder import random_tokens
from tests.tiny_models import MIXTURES, add_tokenizer, make_tiny_model

LONGEST = 90
KINDS = [kind if kind == "qwen2_moe" else pytest.param(kind, marks=pytest.mark.slow) for kind in MIXTURES]


def make_served(folder: Path, kind: str) -> Path:
    source = make_tiny_model(folder / "source", kind, torch.float16)
    make_awq_checkpoint(source, folder / "awq", folder / "dense", 32)
    add_tokenizer(folder / "awq")
    return folder / "awq"


def requests(count: int = 12) -> list[GenerateRequest]:
    """Greedy and sampled, prompts of 1 to LONGEST tokens, some of which begin alike."""
    text, found = random_tokens(400), []
    for index in range(count):
        start = 0 if index % 3 == 0 else 31 * index
        sampling = SamplingParams(12, temperature=0.0 if index % 2 else 0.9, top_p=0.95, seed=index, ignore_eos=True)
        prompt = text[start : start + 1 + (index * 53) % LONGEST]
        found.append(GenerateRequest(f"r{index}", prompt, sampling, time.monotonic()))
    return found


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_the_load(backend: str, kind: str, tmp_path: Path) -> None:
    try:
        check_law(builder(make_served(tmp_path, kind), backend, 2, LONGEST), requests())
    finally:
        torch.set_num_threads(1)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_native_predictions_are_the_references(kind: str, tmp_path: Path) -> None:
    """Where activations are rounded finely enough not to choose other experts, as good as exactly; int8 within its bound."""
    folder = make_served(tmp_path, kind)
    config, tokens = load_model_config(folder), random_tokens(LONGEST)
    tables, num_blocks = make_tables([LONGEST])

    def log_probs(name: str, activations: str = "int8") -> torch.Tensor:
        options = BackendOptions(
            num_threads=2 if name == "cpu" else 0, cpu_activations=activations, lm_head_dtype="fp16"
        )
        backend = create_backend(name, options)
        decoder = load_decoder(folder, config, backend, 128)
        kv = backend.allocate_kv(
            KVCacheSpec(config.num_layers, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        )
        batch = make_batch([LONGEST], [LONGEST], tables, list(range(LONGEST)), tokens)
        return decoder.forward(batch, kv).log_softmax(-1)

    expected = log_probs("reference")
    for activations, bound in (("int16", 1e-4), ("int8", 0.1)):
        divergence = (expected.exp() * (expected - log_probs("cpu", activations))).sum(-1)
        assert 0 < divergence.mean() < bound, activations
