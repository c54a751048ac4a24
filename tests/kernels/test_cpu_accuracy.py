"""What each approximation of the native CPU kernels costs on the real model, one at a time with everything else at the reference:
KL divergence from the reference's distribution and perplexity over 12 x 1024 tokens of English."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.backend import Backend, BackendOptions, ForwardBatch, KVCache, KVCacheSpec, LinearInput, PreparedLinear
from kernels.format import AwqWeight, DenseWeight
from kernels.reference import DenseInput, ReferenceBackend
from server.model_config import load_model_config
from server.models.decoder import Decoder
from server.models.loader import load_decoder
from tests.kernels.batches import BLOCK_SIZE, make_batch, make_tables
from tests.kernels.cpu_support import needs_native

NUM_WINDOWS, WINDOW = 12, 1024


class WithCpuOps(ReferenceBackend):
    """The reference, with some of its ops computed by the native kernels on the reference's own inputs."""

    def __init__(self, ops: frozenset[str], **options: str) -> None:
        from kernels.cpu.backend import CpuBackend

        super().__init__(BackendOptions())
        self.ops = ops
        self.cpu = CpuBackend(BackendOptions(**options))  # type: ignore[arg-type]

    def _dense(self, x: LinearInput) -> LinearInput:
        from kernels.cpu.linear import CpuLinearInput

        tensor = x.dense().contiguous()
        return CpuLinearInput(tensor.shape[0], tensor, ())

    def prepare_linear(self, weights: Sequence[AwqWeight | DenseWeight], bias: Tensor | None) -> PreparedLinear:  # type: ignore[override]
        return (self.cpu if "linear" in self.ops else super()).prepare_linear(weights, bias)

    def prepare_head(self, weight: DenseWeight | AwqWeight) -> PreparedLinear:  # type: ignore[override]
        if "logits" in self.ops:
            return self.cpu.prepare_head(weight)
        return ReferenceBackend.prepare_linear(self, [weight], None)

    def linear(self, x: LinearInput, weight: PreparedLinear) -> Tensor:
        return self.cpu.linear(self._dense(x), weight) if "linear" in self.ops else super().linear(x, weight)

    def logits(  # type: ignore[override]
        self, hidden: LinearInput, batch: ForwardBatch, head: PreparedLinear, soft_cap: float | None = None
    ) -> Tensor:
        if "logits" in self.ops:
            return self.cpu.logits(self._dense(hidden), batch, head, soft_cap)
        rows = batch.logit_rows[: batch.num_rows].long()
        return ReferenceBackend.linear(self, DenseInput(hidden.dense()[rows]), head)

    def allocate_kv(self, spec: KVCacheSpec) -> list[KVCache]:
        return self.cpu.allocate_kv(spec) if "attention" in self.ops else super().allocate_kv(spec)

    def rope_and_store(self, qkv, *args):  # type: ignore[no-untyped-def]
        return (
            self.cpu.rope_and_store(qkv.contiguous(), *args)
            if "attention" in self.ops
            else super().rope_and_store(qkv, *args)
        )

    def attention(self, q, *args, **options):  # type: ignore[no-untyped-def]
        if "attention" not in self.ops:
            return super().attention(q, *args, **options)
        options.pop("for_linear", None)
        return DenseInput(self.cpu.attention(q, *args, **options).dense())


@dataclass(frozen=True)
class Cost:
    kl: float
    perplexity_ratio: float


def logits_of(decoder: Decoder, backend: Backend, tokens: list[int], kv_dtype: str = "auto") -> Tensor:
    config = decoder.config
    tables, num_blocks = make_tables([len(tokens)])
    spec = KVCacheSpec(config.num_layers, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim, kv_dtype)
    batch = make_batch([len(tokens)], [len(tokens)], tables, list(range(len(tokens))), tokens)
    return decoder.forward(batch, backend.allocate_kv(spec))


VARIANTS: dict[str, tuple[frozenset[str], dict[str, str], str]] = {
    "int8 activations": (frozenset({"linear"}), {"cpu_activations": "int8"}, "auto"),
    "int16 activations": (frozenset({"linear"}), {"cpu_activations": "int16"}, "auto"),
    "int8 lm_head": (frozenset({"logits"}), {"lm_head_dtype": "int8"}, "auto"),
    "fp16 KV cache": (frozenset({"attention"}), {}, "fp16"),
    "int8 KV cache": (frozenset({"attention"}), {"kv_cache_dtype": "int8"}, "int8"),
}
LARGEST_KL = {
    "int8 activations": 5e-3,
    "int16 activations": 1e-5,
    "int8 lm_head": 1e-3,
    "fp16 KV cache": 1e-5,
    "int8 KV cache": 2e-3,
}


def english_tokens(demo_model: Path, count: int) -> list[int]:
    """Python's help topics end to end. (Where text is mostly links and markup, the model itself is so unsure of single tokens that
    a few of them outweigh all others: the bounds are for prose.)"""
    tokens = Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode("\n".join(sorted(topics.values()))).ids
    assert len(tokens) >= count
    return tokens[:count]


@needs_native
@pytest.mark.slow
@torch.inference_mode()
def test_each_approximation_stays_within_its_bound(demo_model: Path) -> None:
    text = english_tokens(demo_model, NUM_WINDOWS * WINDOW)
    config = load_model_config(demo_model)
    reference = ReferenceBackend(BackendOptions())
    decoder = load_decoder(demo_model, config, reference, WINDOW)
    variants: dict[str, tuple[Decoder, Backend, str]] = {}
    for name, (ops, options, kv_dtype) in VARIANTS.items():
        backend = WithCpuOps(ops, **options)
        variants[name] = load_decoder(demo_model, config, backend, WINDOW), backend, kv_dtype
    kl = dict.fromkeys(VARIANTS, 0.0)
    nll = dict.fromkeys([*VARIANTS, "reference"], 0.0)
    for start in range(0, len(text), WINDOW):
        window = text[start : start + WINDOW]
        targets = torch.tensor(window[1:])[:, None]
        expected = logits_of(decoder, reference, window).log_softmax(-1)
        nll["reference"] -= expected[:-1].gather(1, targets).double().sum().item()
        probabilities = expected.exp()
        for name, (variant, backend, kv_dtype) in variants.items():
            got = logits_of(variant, backend, window, kv_dtype).log_softmax(-1)
            nll[name] -= got[:-1].gather(1, targets).double().sum().item()
            kl[name] += got.neg_().add_(expected).mul_(probabilities).sum(-1).double().sum().item()
    num_tokens, num_targets = NUM_WINDOWS * WINDOW, NUM_WINDOWS * (WINDOW - 1)
    print()
    costs = {
        name: Cost(kl[name] / num_tokens, math.exp((nll[name] - nll["reference"]) / num_targets)) for name in VARIANTS
    }
    for name, cost in costs.items():
        print(f"{name:<20} KL {cost.kl:.2e} (bound {LARGEST_KL[name]:.0e})  perplexity x {cost.perplexity_ratio:.5f}")
    for name, cost in costs.items():
        # As an identity would pass: each variant does differ from the reference, by no more than its bound.
        assert 0 < cost.kl <= LARGEST_KL[name], (name, cost)
        assert abs(cost.perplexity_ratio - 1) <= 0.006, (name, cost)
