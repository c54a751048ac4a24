"""GPTQ and compressed-tensors checkpoints are served as what their weights mean; what is not supported is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.backend import BackendOptions
from kernels.format import FormatError
from kernels.reference import ReferenceBackend
from server.model_config import ModelError, load_model_config
from server.models.loader import load_decoder
from tests.awq_checkpoints import make_awq_checkpoint
from tests.packed_checkpoints import GPTQ_CONFIG, compressed_config, repack
from tests.server.models.test_decoder import Served, assert_close_logits, random_tokens
from tests.tiny_models import load_reference, make_tiny_model, reference_logits

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}


def _make(folder: Path, kind: str, group_size: int, layout: str, skip: tuple[str, ...] = ()) -> Path:
    source = make_tiny_model(folder / "source", kind, torch.float16, **SIZES)
    make_awq_checkpoint(source, folder / "packed", folder / "dense", group_size, skip)
    repack(folder / "packed", layout)
    return folder / "packed"


@pytest.mark.parametrize(
    ("kind", "group_size", "layout", "skip"),
    [
        ("llama", 32, "gptq", ()),
        ("qwen2", 64, "gptq_v2", ("down_proj",)),
        ("qwen3", -1, "gptq", ()),
        ("llama-untied-biased", 32, "compressed-tensors", ()),
        ("mistral", -1, "compressed-tensors", ("v_proj",)),
        ("mixtral", 32, "gptq", ("experts.1.",)),
        ("qwen2_moe", 32, "compressed-tensors", ("shared_expert.",)),
        ("qwen3_moe", -1, "compressed-tensors", ()),
    ],
)
def test_served_as_what_the_weights_mean(
    kind: str, group_size: int, layout: str, skip: tuple[str, ...], tmp_path: Path
) -> None:
    packed = _make(tmp_path, kind, group_size, layout, skip)
    tokens = random_tokens(40)
    expected = reference_logits(load_reference(tmp_path / "dense"), tokens)
    assert_close_logits(Served(packed).logits(tokens, [40]), expected)


def _load(folder: Path) -> None:
    load_decoder(folder, load_model_config(folder), ReferenceBackend(BackendOptions()), 64)


def _configure(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**GPTQ_CONFIG, "group_size": 32, "bits": 8}, "bits 8 is not supported; supported: 4"),
    ({**GPTQ_CONFIG, "group_size": 32, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    ({**GPTQ_CONFIG, "group_size": 32, "dynamic": {"-:.*down.*": {}}}, "dynamic .* is not supported"),
    ({**GPTQ_CONFIG, "group_size": 0}, "group_size must be a positive integer or -1, found 0"),
    ({**compressed_config(32, False), "format": "int-quantized"}, "format 'int-quantized' is not supported"),
    (compressed_config(32, False, num_bits=8), "num_bits 8 is not supported; supported: 4"),
    (compressed_config(32, False, type="float"), "type 'float' is not supported; supported: int"),
    (compressed_config(32, False, actorder="group"), r"actorder 'group' \(activation order\) is not supported"),
    (compressed_config(32, False, actorder="dynamic"), r"actorder 'dynamic' \(activation order\) is not supported"),
    (compressed_config(32, False, strategy="block"), "strategy 'block' is not supported; supported: group, channel"),
    ({**compressed_config(32, False), "config_groups": {}}, "expected one way to store weights, found 0 groups"),
    ({**compressed_config(32, False), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .* is not supported"),
    (
        {**compressed_config(32, False), "transform_config": {"config_groups": {}}},
        "transform_config .* is not supported",
    ),
    (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv_fast"},
        "version 'gemv_fast' is not supported",
    ),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
]


@pytest.mark.parametrize(("quantization", "message"), REFUSED)
def test_other_variants_are_refused_by_name(quantization: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "source", "llama", torch.float16, num_hidden_layers=1)
    _configure(folder, quantization)
    with pytest.raises(ModelError, match=message):
        load_model_config(folder)


def test_activation_order_is_refused_only_where_it_changes_the_groups(tmp_path: Path) -> None:
    packed = _make(tmp_path, "llama", 32, "gptq")
    _configure(packed, {**GPTQ_CONFIG, "group_size": 32, "desc_act": True})
    _load(packed)
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.g_idx"
    save_file({**tensors, name: tensors[name].flip(0).contiguous()}, packed / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.down_proj\.g_idx: .* activation order"):
        _load(packed)
    tensors.pop(name)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(ModelError, match=rf"tensor {name} is missing"):
        _load(packed)


def test_symmetric_weights_have_no_zero_points_to_read(tmp_path: Path) -> None:
    packed = _make(tmp_path, "llama", 32, "compressed-tensors")
    _configure(packed, compressed_config(32, True))
    with pytest.raises(ModelError, match=r"has no tensor .*weight_zero_point"):
        _load(packed)
