"""Tiny models of every architecture: our logits equal transformers', however the tokens are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, BackendOptions, KVCacheSpec
from kernels.batch import ForwardBatch
from kernels.reference import ReferenceBackend
from server.model_config import load_model_config
from server.models.loader import load_decoder
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables
from tests.tiny_models import TINY_MODELS, load_reference, make_tiny_model, reference_logits

LENGTH = 90


class Served:
    """A loaded decoder that runs one sequence, in steps of given sizes."""

    def __init__(self, directory: Path, max_model_len: int = 128, backend: Backend | None = None) -> None:
        self.config = load_model_config(directory)
        self.backend = backend or ReferenceBackend(BackendOptions())
        self.decoder = load_decoder(directory, self.config, self.backend, max_model_len)

    @torch.inference_mode()
    def logits(self, tokens: list[int], chunks: list[int]) -> Tensor:
        tables, num_blocks = make_tables([len(tokens)])
        spec = KVCacheSpec(
            self.config.num_layers, num_blocks, BLOCK_SIZE, self.config.num_kv_heads, self.config.head_dim
        )
        kv = self.backend.allocate_kv(spec)
        rows, start = [], 0
        for chunk in chunks:
            end = start + chunk
            batch: ForwardBatch = make_batch([chunk], [end], tables, list(range(chunk)), tokens[start:end])
            rows.append(self.decoder.forward(batch, kv))
            start = end
        return torch.cat(rows)


def random_tokens(length: int, vocabulary: int = 320) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_close_logits(got: Tensor, expected: Tensor) -> None:
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"largest relative error {error:.2e}"


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, kind)
    tokens = random_tokens(LENGTH)
    expected = reference_logits(load_reference(directory), tokens)
    served = Served(directory)
    whole = served.logits(tokens, [LENGTH])
    assert_close_logits(whole, expected)
    chunked = served.logits(tokens, [1, 16, 40, 1, 31, 1])
    assert torch.equal(chunked, whole), "bits depend on the chunks"


ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("rope", ROPE)
def test_rope_types_equal_transformers(rope: str, tmp_path: Path) -> None:
    parameters = {**ROPE[rope], "rope_theta": 5000.0}
    directory = make_tiny_model(tmp_path, "llama", rope_parameters=parameters)
    tokens = random_tokens(LENGTH)
    expected = reference_logits(load_reference(directory), tokens)
    assert_close_logits(Served(directory).logits(tokens, [LENGTH]), expected)


@pytest.mark.parametrize("max_model_len", [48, 128])
def test_dynamic_rope_is_fixed_for_the_context(max_model_len: int, tmp_path: Path) -> None:
    """Frequencies are those that transformers uses for a sequence of exactly max_model_len tokens."""
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    directory = make_tiny_model(tmp_path, "llama", max_position_embeddings=64, rope_parameters=parameters)
    tokens = random_tokens(max_model_len)
    expected = reference_logits(load_reference(directory), tokens)
    assert_close_logits(Served(directory, max_model_len).logits(tokens, [max_model_len]), expected)


@pytest.mark.parametrize("max_model_len", [48, 128])
def test_longrope_is_chosen_for_the_context(max_model_len: int, tmp_path: Path) -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
    }
    directory = make_tiny_model(tmp_path, "llama", max_position_embeddings=128, rope_parameters=parameters)
    tokens = random_tokens(max_model_len)
    expected = reference_logits(load_reference(directory), tokens)
    assert_close_logits(Served(directory, max_model_len).logits(tokens, [max_model_len]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_16_bit_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "llama-untied-biased", dtype, max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    tokens = random_tokens(30)
    assert_close_logits(Served(directory).logits(tokens, [30]), reference_logits(load_reference(directory), tokens))
