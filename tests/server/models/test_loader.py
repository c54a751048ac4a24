"""AWQ checkpoints load and mean what their dequantized weights mean; wrong files are refused by file, tensor and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.backend import BackendOptions
from kernels.format import FormatError
from kernels.reference import ReferenceBackend
from server.model_config import ModelError, load_model_config
from server.models.loader import load_decoder
from tests.awq_checkpoints import make_awq_checkpoint
from tests.server.models.test_decoder import Served, assert_close_logits, random_tokens
from tests.tiny_models import load_reference, make_tiny_model, reference_logits

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}

# Pairwise over kind, group size, dtype of the rest, dtype of the scales and skipped modules.
CASES = [
    ("llama", 32, torch.float16, torch.float16, ()),
    ("llama", -1, torch.bfloat16, torch.bfloat16, ("down_proj",)),
    ("llama-untied-biased", 64, torch.bfloat16, torch.float16, ("layers.0.self_attn.k_proj",)),
    ("llama-untied-biased", 32, torch.float32, torch.bfloat16, ()),
    ("mistral", 128, torch.float16, torch.float16, ("o_proj",)),
    ("qwen2", 64, torch.float16, torch.bfloat16, ()),
    ("qwen2", 128, torch.bfloat16, torch.float16, ("v_proj",)),
    ("qwen3", -1, torch.float32, torch.float16, ()),
    ("qwen3", 64, torch.float16, torch.float16, ("gate_proj",)),
    ("mixtral", 32, torch.float16, torch.float16, ("experts.2.w1", "experts.3.")),
    ("qwen2_moe", 32, torch.bfloat16, torch.float16, ("layers.1.mlp.shared_expert",)),
]


@pytest.mark.parametrize(("kind", "group_size", "dtype", "scale_dtype", "skip"), CASES)
def test_awq_equals_its_dequantized_weights(
    kind: str, group_size: int, dtype: torch.dtype, scale_dtype: torch.dtype, skip: tuple[str, ...], tmp_path: Path
) -> None:
    sizes = {**SIZES, "head_dim": 32}
    source = make_tiny_model(tmp_path / "source", kind, dtype, **sizes)
    make_awq_checkpoint(source, tmp_path / "awq", tmp_path / "dense", group_size, skip, scale_dtype)
    tokens = random_tokens(40)
    expected = reference_logits(load_reference(tmp_path / "dense"), tokens)
    assert_close_logits(Served(tmp_path / "awq").logits(tokens, [40]), expected)


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    source = make_tiny_model(tmp_path / "source", "llama", torch.float16, **SIZES)
    make_awq_checkpoint(source, tmp_path / "awq", tmp_path / "dense", 64)
    return tmp_path / "awq"


def load(directory: Path) -> None:
    config = load_model_config(directory)
    load_decoder(directory, config, ReferenceBackend(BackendOptions()), 64)


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def edit_config(directory: Path, **values: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


Q = "model.layers.1.self_attn.q_proj"

WRONG_TENSORS: list[tuple[Callable[[dict], object], str]] = [
    (lambda t: t.pop(f"{Q}.qzeros"), rf"tensor {Q}\.qzeros is missing"),
    (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
    (
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:64]}),
        rf"model\.safetensors: tensor {Q}\.qweight: expected shape \[128, 16\], found \[64, 16\]",
    ),
    (
        lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}),
        rf"tensor {Q}\.scales: expected dtype F16 or BF16, found F32",
    ),
    (
        lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}),
        rf"tensor {Q}\.qweight: expected dtype I32, found F32",
    ),
    (
        lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(1)}),
        r"a llama model has no tensor model\.layers\.7\.mlp\.up_proj\.weight",
    ),
    (
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100]}),
        r"tensor model\.embed_tokens\.weight: expected shape \[320, 128\], found \[100, 128\]",
    ),
]


@pytest.mark.parametrize(("edit", "message"), WRONG_TENSORS)
def test_wrong_tensors_are_refused_by_name(awq: Path, edit: Callable, message: str) -> None:
    edit_tensors(awq, edit)
    with pytest.raises((ModelError, FormatError), match=message):
        load(awq)


WRONG_CONFIGS: list[tuple[dict, str]] = [
    ({"model_type": "falcon"}, "model_type 'falcon' is not supported; supported: llama, mistral"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral' is not supported"),
    ({"hidden_size": "big"}, "hidden_size must be a positive integer, found 'big'"),
    ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' is not supported"),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 64}},
        "bits 3 is not supported; supported: 4",
    ),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}},
        "version 'gemv' is not supported",
    ),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 0}},
        "group_size must be a positive integer or -1, found 0",
    ),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 48}},
        "inputs of the group size 48",
    ),
    ({"quantization_config": None}, r"no quantization_config, but the checkpoint has model\.layers\.0"),
    ({"intermediate_size": 512}, r"expected shape \[128, 64\], found \[128, 32\]"),
]


WRONG_FIELDS: list[tuple[str, dict, str]] = [
    ("gemma2", {"hidden_activation": "relu2"}, "hidden_activation 'relu2' is not supported"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number, found 0"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping must be a positive number, found -1.0"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, r"layer_types holds \['chunked_attention'\]"),
    ("gemma2", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "p"}}},
        "rope type 'p' is not supported",
    ),
    ("gemma3_text", {"model_type": "gemma3"}, "a gemma3 model needs text_config"),
    ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "rotates 24 of 16 channels"),
    ("phi3", {"num_key_value_heads": 4}, r"qkv_proj\.weight: expected shape \[192, 64\], found \[128, 64\]"),
    ("phi3", {"intermediate_size": 80}, r"gate_up_proj\.weight: expected shape \[160, 64\], found \[192, 64\]"),
    ("granite", {"residual_multiplier": 0.0}, "residual_multiplier must be a positive number, found 0.0"),
    ("granite", {"logits_scaling": "8"}, "logits_scaling must be a positive number, found '8'"),
    ("olmo2", {"model_type": "llama"}, r"input_layernorm\.weight is missing"),
    ("olmo2", {"head_dim": 8}, r"q_norm\.weight: expected shape \[32\], found \[64\]"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 3 layers"),
    ("llama", {"model_type": "olmo2"}, r"post_feedforward_layernorm\.weight is missing"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG_FIELDS)
def test_wrong_fields_of_an_architecture_are_refused(kind: str, values: dict, message: str, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, kind)
    edit_config(directory, **values)
    with pytest.raises(ModelError, match=message):
        load(directory)


# What published config.json files leave out, or spell as transformers did when the models came out.
OLDER_CONFIGS: list[tuple[str, tuple[str, ...], dict]] = [
    ("gemma2", ("tie_word_embeddings", "hidden_activation"), {"hidden_act": "gelu_pytorch_tanh"}),
    (
        "gemma3_text",
        ("rope_parameters", "layer_types", "tie_word_embeddings"),
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
        | {"sliding_window_pattern": 2},
    ),
    ("smollm3", ("no_rope_layers", "layer_types", "tie_word_embeddings"), {"no_rope_layer_interval": 2}),
    ("qwen2", ("layer_types",), {}),
    ("qwen2_moe", ("layer_types",), {}),
]


@pytest.mark.parametrize(("kind", "left_out", "values"), OLDER_CONFIGS)
def test_older_configs_mean_the_same(kind: str, left_out: tuple[str, ...], values: dict, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, kind)
    expected = Served(directory)
    config = json.loads((directory / "config.json").read_text())
    older = {field: value for field, value in config.items() if field not in left_out}
    (directory / "config.json").write_text(json.dumps({**older, **values}))
    tokens = random_tokens(40)
    got = Served(directory)
    assert torch.equal(got.logits(tokens, [40]), expected.logits(tokens, [40]))
    assert got.config.max_context == expected.config.max_context


def test_older_phi_names_of_longrope(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, "phi3")
    expected, tokens = Served(directory), random_tokens(40)
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    factors = {field: rope[field] for field in ("short_factor", "long_factor")}
    for name in ("su", "yarn", "longrope"):
        edit_config(
            directory,
            rope_parameters=None,
            rope_scaling={"type": name, **factors},
            rope_theta=1e4,
            partial_rotary_factor=0.75,
        )
        assert torch.equal(Served(directory).logits(tokens, [40]), expected.logits(tokens, [40]))


@pytest.mark.parametrize(("values", "message"), WRONG_CONFIGS)
def test_wrong_configs_are_refused_by_field(awq: Path, values: dict, message: str) -> None:
    edit_config(awq, **values)
    with pytest.raises((ModelError, FormatError), match=message):
        load(awq)


WRONG_MIXTURES: list[tuple[str, dict, str]] = [
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts"),
    (
        "mixtral",
        {"num_local_experts": 5},
        r"tensor model\.layers\.0\.block_sparse_moe\.gate\.weight: expected shape \[5",
    ),
    ("mixtral", {"num_local_experts": None}, "num_local_experts must be a positive integer, found None"),
    ("qwen2_moe", {"moe_intermediate_size": 48}, r"experts\.0\.gate_proj\.weight: expected shape \[48, 64\]"),
    ("qwen2_moe", {"model_type": "qwen3_moe"}, r"tensor model\.layers\.0\.self_attn\.q_norm\.weight is missing"),
    ("qwen3_moe", {"mlp_only_layers": []}, r"tensor model\.layers\.1\.mlp\.gate\.weight is missing"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, r"tensor model\.layers\.0\.mlp\.gate_proj\.weight is missing"),
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG_MIXTURES)
def test_mixtures_that_are_not_what_the_config_says_are_refused(
    kind: str, values: dict, message: str, tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path, kind)
    edit_config(folder, **values)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_an_expert_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name.format(4): tensors[name.format(3)].clone()}))
    with pytest.raises(ModelError, match=r"a mixtral model has no tensor .*experts\.4\.w2\.weight"):
        load(folder)
    edit_tensors(folder, lambda tensors: [tensors.pop(name.format(index)) for index in (3, 4)])
    with pytest.raises(ModelError, match=r"experts\.3\.w2\.weight is missing"):
        load(folder)


def test_older_autoawq_config_file(awq: Path) -> None:
    """Before it wrote into config.json, AutoAWQ kept quant_config.json with its own names."""
    expected = load_model_config(awq).quantization
    edit_config(awq, quantization_config=None)
    legacy = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    (awq / "quant_config.json").write_text(json.dumps(legacy))
    assert expected is not None and load_model_config(awq).quantization == expected
    load(awq)


def test_truncated_foreign_and_missing_files(awq: Path, tmp_path: Path) -> None:
    weights = awq / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete safetensors file"):
        load(awq)
    weights.rename(awq / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors files \(found pytorch_model\.bin\)"):
        load(awq)
    (awq / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ModelError, match=r"names \.\./model\.safetensors"):
        load(awq)
    (awq / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not valid JSON"):
        load(awq)
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        load(tmp_path / "source" / "nowhere")
