"""Mixtures of experts of which some stay in 16 bit, quantized and served: routers stay as they are, and what the server computes
is what the written checkpoint means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantizer.config import QuantizeOptions
from quantizer.evaluate import load_checkpoint
from quantizer.run import quantize
from tests.server.models.test_decoder import Served, assert_close_logits, random_tokens
from tests.tiny_models import add_tokenizer, make_tiny_model, reference_logits

CASES = [
    ("mixtral", "awq"),
    pytest.param("qwen2_moe", "compressed-tensors", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "awq", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_quantized_mixture_is_served_as_it_was_judged(kind: str, layout: str, tmp_path: Path) -> None:
    source, out = make_tiny_model(tmp_path / "source", kind, torch.float16), tmp_path / "out"
    add_tokenizer(source)
    skipped = ("experts.1.",)
    options = QuantizeOptions(
        group_size=32, samples=4, sequence_length=64, format=layout, modules_to_not_convert=skipped
    )
    report = quantize(str(source), out, options, progress=False)
    names = {linear["name"] for layer in report["layers"] for linear in layer["linears"]}
    assert any("experts.0." in name for name in names)
    assert not any("experts.1." in name or name.endswith(("gate", "expert_gate")) for name in names)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "experts.1." in str(config)
    tokens = random_tokens(40)
    expected = reference_logits(load_checkpoint(out), tokens)
    first, again = (Served(out).logits(tokens, [40]) for _ in range(2))
    assert_close_logits(first, expected)
    assert torch.equal(first, again)
