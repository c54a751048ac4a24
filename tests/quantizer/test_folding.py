"""Folding changes no output: logits before rounding equal the original's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantizer.folding import fold, shared_channels
from quantizer.mappings import Fold, find_architecture
from quantizer.mixtures import loaded_tensors
from tests.tiny_models import TINY_MODELS, layer_tensors, load_reference, make_tiny_model, reference_logits


def _random_scales(channels: int, shared: torch.Tensor | None) -> torch.Tensor:
    scales = torch.empty(channels).uniform_(-3, 3).exp()
    return scales if shared is None else scales[shared]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_folded_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Which experts a token gets included: a router reads the same folded norm as its experts."""
    directory = make_tiny_model(tmp_path, kind)
    model = load_reference(directory)
    tokens = torch.randint(3, 320, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference_logits(model, tokens)
    architecture = find_architecture(model.config)
    torch.manual_seed(0)
    for index, layer in enumerate(model.model.layers):
        tensors = layer_tensors(directory, index)
        before = dict(tensors)
        for group in architecture.layer_groups(model.config, index):
            shared = shared_channels(model.config, group)
            channels = tensors[f"{group.linears[0]}.weight"].shape[1]
            used, _ = fold(tensors, group, _random_scales(channels, shared), torch.float32, model.config)
            assert (used == 1).all() == (group.fold is Fold.NONE)
        folded = [group for group in architecture.layer_groups(model.config, index) if group.fold is not Fold.NONE]
        for linear in (linear for group in folded for linear in group.linears):
            assert not torch.allclose(before[f"{linear}.weight"], tensors[f"{linear}.weight"])
        layer.load_state_dict(loaded_tensors(architecture, tensors), assign=True)
    actual = reference_logits(model, tokens)
    assert (actual - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_folds_are_exact_in_the_stored_dtype(dtype: torch.dtype, offset: float, tmp_path: Path) -> None:
    """The scale is taken from the rounded norm weight, so that rounding it costs nothing, out-of-range channels included."""
    model = load_reference(make_tiny_model(tmp_path, "gemma2" if offset else "llama"))
    group = find_architecture(model.config).groups[0]
    assert group.fold is (Fold.UNIT_NORM if offset else Fold.NORM)
    tensors = dict(model.model.layers[0].state_dict())
    norm, name = tensors["input_layernorm.weight"].clone(), "self_attn.q_proj.weight"
    norm[0], norm[1] = -offset, 60000.0
    tensors["input_layernorm.weight"], original = norm, tensors[name]
    scales = torch.full_like(norm, 0.3)
    scales[1] = 1e-3  # 6e7 overflows fp16
    used, rows = fold(tensors, group, scales, dtype, model.config)
    stored = tensors["input_layernorm.weight"]
    assert rows.numel() == 0
    assert torch.equal(stored, stored.to(dtype).float()) and torch.isfinite(stored).all()
    assert torch.allclose((stored + offset) * used, norm + offset, rtol=1e-6)
    assert torch.allclose(tensors[name], original * used)
    assert used[0] == 1


def test_query_heads_share_their_kv_heads_channels(tmp_path: Path) -> None:
    model = load_reference(make_tiny_model(tmp_path, "qwen3"))
    groups = find_architecture(model.config).groups
    shared = shared_channels(model.config, next(group for group in groups if group.fold is Fold.KV_ROWS))
    assert shared is not None
    head_size, per_kv = 32, 2
    for channel in range(model.config.num_attention_heads * head_size):
        head, within = divmod(channel, head_size)
        assert shared[channel] == (head // per_kv) * head_size + within
