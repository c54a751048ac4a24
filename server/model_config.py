"""A checkpoint's config.json, read once into a frozen `ModelConfig`; nothing else looks into the JSON.

Architectures are rows of `ARCHITECTURES`: flags on one decoder, not classes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A checkpoint that cannot be served; the message names file, field or tensor, what was expected and what was found."""


@dataclass(frozen=True, slots=True)
class MixtureNames:
    """How a model type spells its mixture of experts: fields of config.json, and modules of a layer."""

    module: str
    """Of the layer; router and experts are in it."""
    gate: str
    up: str
    down: str
    """Linears of one expert."""
    intermediate_size: str
    renormalize: str | None
    """A field that says so; None: always."""
    shared: bool = False
    """A shared expert, `shared_expert`, with the gate `shared_expert_gate`."""
    some_layers: bool = False
    """Which layers are mixtures, `mlp_only_layers` and `decoder_sparse_step` say; otherwise all are."""


_QWEN_MIXTURE = MixtureNames(
    module="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    intermediate_size="moe_intermediate_size",
    renormalize="norm_topk_prob",
    some_layers=True,
)
_MIXTRAL_MIXTURE = MixtureNames(
    module="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    intermediate_size="intermediate_size",
    renormalize=None,
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the code must know of a model type that its config.json does not say."""

    qkv_bias: bool | None = False  # None: config.json's `attention_bias` says
    o_bias: bool | None = False
    qk_norm: bool = False
    sliding_window: str = (
        "none"  # "all" layers, "used" for all if `use_sliding_window`, "layer_types" as config.json lists them
    )
    mixture: MixtureNames | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(qkv_bias=None, o_bias=None),
    "mistral": Architecture(sliding_window="all"),
    "qwen2": Architecture(qkv_bias=True, sliding_window="layer_types"),
    "qwen3": Architecture(qkv_bias=None, o_bias=None, qk_norm=True, sliding_window="layer_types"),
    "mixtral": Architecture(sliding_window="all", mixture=_MIXTRAL_MIXTURE),
    "qwen2_moe": Architecture(qkv_bias=True, sliding_window="layer_types", mixture=replace(_QWEN_MIXTURE, shared=True)),
    "qwen3_moe": Architecture(qkv_bias=None, o_bias=None, qk_norm=True, sliding_window="used", mixture=_QWEN_MIXTURE),
}

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: type, base and the type's own parameters as config.json spells them."""

    rope_type: str
    theta: float
    rotary_dim: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """4-bit weights as declared. `modules_to_not_convert` is informative: which modules are dense shows in their tensors."""

    group_size: int  # -1: a whole row
    modules_to_not_convert: tuple[str, ...]
    method: str = "awq"  # or "gptq" or "compressed-tensors"
    symmetric: bool = False  # compressed-tensors: no zero points are stored
    stores_zero_less_one: bool = False  # gptq's first version
    activation_order: bool = False  # gptq: declared so, which g_idx must then confute


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """A mixture of experts: how many, how many compute a token, and their channels."""

    names: MixtureNames
    num_experts: int
    num_active: int
    intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert
    renormalize: bool
    layers: frozenset[int]  # that are mixtures; the others have a dense MLP


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that loading and running a model need. Sizes are counts of channels, heads, layers or tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    activation: str  # a kernels.backend.Activation
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]  # per layer
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None
    mixture: MixtureConfig | None = None

    @property
    def active_intermediate_size(self) -> int:
        """MLP channels that one token passes through, in the layer where it is the most."""
        if self.mixture is None:
            return self.intermediate_size
        active = self.mixture.num_active * self.mixture.intermediate_size + self.mixture.shared_intermediate_size
        return active if len(self.mixture.layers) == self.num_layers else max(active, self.intermediate_size)

    @property
    def max_context(self) -> int:
        """Tokens that the position embedding is made for: the trained context, stretched where the RoPE type stretches it."""
        if self.rope.rope_type not in ("linear", "dynamic", "yarn"):
            return self.max_position_embeddings
        original = self.max_position_embeddings
        if self.rope.rope_type == "yarn":
            original = self.rope.parameters.get("original_max_position_embeddings", original)
        return max(self.max_position_embeddings, int(original * self.rope.parameters.get("factor", 1.0)))


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json (and generation_config.json's end-of-sequence ids, and AutoAWQ's older quant_config.json).

    Raises ModelError for what is missing, malformed or not supported.
    """
    raw = _read_json(model_dir / "config.json", required=True)
    generation = _read_json(model_dir / "generation_config.json", required=False)
    model_type = str(raw.get("model_type"))
    if model_type not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ModelError(f"config.json: model_type {model_type!r} is not supported; supported: {supported}")
    architecture = ARCHITECTURES[model_type]
    hidden_size, num_heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
    num_kv_heads = _positive(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if raw.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    head_dim = _positive(raw, "head_dim", hidden_size // num_heads)
    attention_bias = bool(raw.get("attention_bias", False))
    hidden_act = raw.get("hidden_act", "silu")
    if hidden_act not in ACTIVATIONS:
        raise ModelError(
            f"config.json: hidden_act {hidden_act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    num_layers = _positive(raw, "num_hidden_layers")
    eos = generation.get("eos_token_id") if generation.get("eos_token_id") is not None else raw.get("eos_token_id")
    return ModelConfig(
        model_type=model_type,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_positive(raw, "max_position_embeddings"),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[hidden_act],
        rope=_rope(raw, head_dim),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
        o_bias=attention_bias if architecture.o_bias is None else architecture.o_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture.qk_norm,
        sliding_windows=_sliding_windows(raw, architecture, num_layers),
        eos_token_ids=tuple(_ids(eos)),
        quantization=_quantization(model_dir, raw),
        mixture=_mixture(raw, architecture.mixture, num_layers),
    )


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ModelError(f"{path.name}: not found in {path.parent}")
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def _positive(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {field} must be a positive integer, found {value!r}")
    return value


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(token) for token in value]


def _rope(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Old configs have `rope_theta` and `rope_scaling`, new ones put both into `rope_parameters`."""
    parameters = dict(raw.get("rope_scaling") or {})
    parameters.update(raw.get("rope_parameters") or {})
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"config.json: rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
    partial = float(parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    original = raw.get("original_max_position_embeddings")
    if original is not None:
        parameters.setdefault("original_max_position_embeddings", original)
    return RopeConfig(rope_type, theta, int(head_dim * partial), parameters)


def _mixture(raw: Mapping[str, Any], names: MixtureNames | None, num_layers: int) -> MixtureConfig | None:
    if names is None:
        return None
    # Newer writers spell every model type's count as Mixtral does.
    num_experts = _positive(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts")
    num_active = _positive(raw, "num_experts_per_tok")
    if num_active > num_experts:
        raise ModelError(f"config.json: num_experts_per_tok {num_active} is more than the {num_experts} experts")
    layers = frozenset(range(num_layers))
    if names.some_layers:
        step, dense = _positive(raw, "decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
        layers = frozenset(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)
    return MixtureConfig(
        names=names,
        num_experts=num_experts,
        num_active=num_active,
        intermediate_size=_positive(raw, names.intermediate_size),
        shared_intermediate_size=_positive(raw, "shared_expert_intermediate_size") if names.shared else 0,
        renormalize=names.renormalize is None or bool(raw.get(names.renormalize, False)),
        layers=layers,
    )


def _sliding_windows(raw: Mapping[str, Any], architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if architecture.sliding_window == "none" or window is None:
        return (None,) * num_layers
    if architecture.sliding_window == "all":
        return (int(window),) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    if architecture.sliding_window == "used":
        return (int(window),) * num_layers
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", num_layers)
        layer_types = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    if len(layer_types) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers")
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"config.json: layer_types holds {sorted(unknown)}, which is not supported")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)


def _quantization(model_dir: Path, raw: Mapping[str, Any]) -> QuantizationConfig | None:
    declared, file = raw.get("quantization_config"), "config.json: quantization_config"
    if declared is None:
        declared, file = _read_json(model_dir / "quant_config.json", required=False), "quant_config.json"
        if not declared:
            return None
        declared = {"quant_method": "awq", **declared}
    method = declared.get("quant_method")
    if method not in _QUANTIZATIONS:
        raise ModelError(f"{file}: quant_method {method!r} is not supported; supported: {', '.join(_QUANTIZATIONS)}")
    return _QUANTIZATIONS[method](declared, file)


def _awq(declared: Mapping[str, Any], file: str) -> QuantizationConfig:
    _only(file, "bits", declared.get("bits", declared.get("w_bit")), 4)
    # gemv, gemv_fast and llm-awq hold other integers in other orders under the same names.
    _only(file, "version", str(declared.get("version", "gemm")).lower(), "gemm")
    if declared.get("backend") == "llm-awq":
        raise ModelError(f"{file}: backend 'llm-awq' is not supported; supported: autoawq's gemm layout")
    _only(file, "zero_point", declared.get("zero_point", True), True)
    group_size = _group_size(file, declared.get("group_size", declared.get("q_group_size")))
    return QuantizationConfig(group_size, tuple(declared.get("modules_to_not_convert") or ()))


def _gptq(declared: Mapping[str, Any], file: str) -> QuantizationConfig:
    _only(file, "bits", declared.get("bits"), 4)
    if declared.get("dynamic"):
        raise ModelError(f"{file}: dynamic (settings per module) is not supported")
    version = declared.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise ModelError(f"{file}: checkpoint_format {version!r} is not supported; supported: gptq, gptq_v2")
    return QuantizationConfig(
        _group_size(file, declared.get("group_size")),
        tuple(declared.get("modules_to_not_convert") or ()),
        method="gptq",
        stores_zero_less_one=version == "gptq",
        activation_order=bool(declared.get("desc_act", False)),
    )


def _compressed_tensors(declared: Mapping[str, Any], file: str) -> QuantizationConfig:
    _only(file, "format", declared.get("format"), "pack-quantized")
    groups = list((declared.get("config_groups") or {}).values())
    if not groups or any(group.get("weights") != groups[0].get("weights") for group in groups):
        raise ModelError(f"{file}: config_groups: expected one way to store weights, found {len(groups)} groups")
    for group in groups:
        _only(file, "config_groups: input_activations", group.get("input_activations"), None)
        _only(file, "config_groups: output_activations", group.get("output_activations"), None)
    _only(file, "kv_cache_scheme", declared.get("kv_cache_scheme"), None)
    for field in ("transform_config", "sparsity_config"):
        value = declared.get(field)
        if value and value.get("format") != "dense":
            raise ModelError(f"{file}: {field} {value!r} is not supported")
    weights = groups[0].get("weights") or {}
    _only(file, "config_groups: num_bits", weights.get("num_bits"), 4)
    _only(file, "config_groups: type", weights.get("type", "int"), "int")
    actorder = weights.get("actorder")
    if actorder in ("group", "dynamic", True):  # "weight" and "static" leave the groups as they are
        raise ModelError(f"{file}: config_groups: actorder {actorder!r} (activation order) is not supported")
    strategy = weights.get("strategy", "group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise ModelError(f"{file}: config_groups: strategy {strategy!r} is not supported; supported: group, channel")
    group_size = -1 if strategy == "channel" else _group_size(file, weights.get("group_size"))
    return QuantizationConfig(
        group_size,
        tuple(declared.get("ignore") or ()),
        method="compressed-tensors",
        symmetric=bool(weights.get("symmetric", True)),
    )


_QUANTIZATIONS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors}


def _only(file: str, field: str, value: object, supported: object) -> None:
    if value != supported or isinstance(value, bool) is not isinstance(supported, bool):
        shown = str(supported).lower() if isinstance(supported, bool) else supported
        raise ModelError(f"{file}: {field} {value!r} is not supported; supported: {shown}")


def _group_size(file: str, value: object) -> int:
    if not isinstance(value, int) or (value <= 0 and value != -1):
        raise ModelError(f"{file}: group_size must be a positive integer or -1, found {value!r}")
    return value
