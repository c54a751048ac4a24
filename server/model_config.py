"""A checkpoint's config.json, read once into a frozen `ModelConfig`; nothing else looks into the JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.architectures import ARCHITECTURES, WRAPPERS, Architecture, MixtureNames, Wrapper
from server.quantization_config import ModelError, QuantizationConfig, read_json, read_quantization

__all__ = ["ModelConfig", "ModelError", "QuantizationConfig", "RopeConfig", "load_model_config"]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_FULL, _SLIDING = "full_attention", "sliding_attention"  # as layer_types spells them


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: type, base and the type's own parameters as config.json spells them."""

    rope_type: str
    theta: float
    rotary_dim: int
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Scales:
    """Constants of the forward pass."""

    attention: float
    """Of the scores."""
    embedding: float = 1.0
    residual: float = 1.0
    """Of what each sublayer adds to the residual stream."""
    logits: float = 1.0
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None


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
    rope: RopeConfig  # of layers without a sliding window, at least
    layer_ropes: tuple[RopeConfig | None, ...]  # per layer; None: positions are left out
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sliding_windows: tuple[int | None, ...]  # per layer
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig | None
    scales: Scales
    wrapper: Wrapper | None  # what the decoder lies in
    mixture: MixtureConfig | None

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

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
        if self.architecture.stated_context or self.rope.rope_type not in ("linear", "dynamic", "yarn"):
            return self.max_position_embeddings
        original = self.max_position_embeddings
        if self.rope.rope_type == "yarn":
            original = self.rope.parameters.get("original_max_position_embeddings", original)
        return max(self.max_position_embeddings, int(original * self.rope.parameters.get("factor", 1.0)))


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json (and generation_config.json's end-of-sequence ids, and AutoAWQ's older quant_config.json).

    Raises ModelError for what is missing, malformed or not supported.
    """
    raw = read_json(model_dir / "config.json", required=True)
    generation = read_json(model_dir / "generation_config.json", required=False)
    wrapper = WRAPPERS.get(str(raw.get("model_type")))
    if wrapper is not None:
        raw = _unwrapped(raw, wrapper)
    model_type = str(raw.get("model_type"))
    if model_type not in ARCHITECTURES:
        supported = ", ".join((*ARCHITECTURES, *WRAPPERS))
        raise ModelError(f"config.json: model_type {model_type!r} is not supported; supported: {supported}")
    architecture = ARCHITECTURES[model_type]
    raw = {**architecture.defaults, **raw}
    if raw.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention is not supported: this is no causal model")
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
    activation = raw.get(architecture.activation, "silu")
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"config.json: {architecture.activation} {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    num_layers = _positive(raw, "num_hidden_layers")
    kinds = _layer_kinds(raw, architecture, num_layers)
    rope, local_rope = _ropes(raw, architecture, head_dim)
    rotates = _rotating_layers(raw, architecture, num_layers)
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
        activation=ACTIVATIONS[activation],
        rope=rope,
        layer_ropes=tuple(
            (rope if kind == _FULL else local_rope) if rotated else None
            for kind, rotated in zip(kinds, rotates, strict=True)
        ),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
        o_bias=attention_bias if architecture.o_bias is None else architecture.o_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        sliding_windows=tuple(None if kind == _FULL else raw.get("sliding_window") for kind in kinds),
        eos_token_ids=tuple(_ids(eos)),
        quantization=read_quantization(model_dir, raw),
        scales=_scales(raw, architecture, hidden_size, head_dim),
        wrapper=wrapper,
        mixture=_mixture(raw, architecture.mixture, num_layers),
    )


def _unwrapped(raw: Mapping[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """The decoder's own fields, with those of the whole that concern it."""
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        raise ModelError(f"config.json: a {raw['model_type']} model needs text_config, found {inner!r}")
    outer = {field: raw[field] for field in ("eos_token_id", "quantization_config") if raw.get(field) is not None}
    return {**inner, **outer, "model_type": wrapper.model_type}


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


def _number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = raw.get(field)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {field} must be a positive number, found {value!r}")
    return float(value)


def _ropes(raw: Mapping[str, Any], architecture: Architecture, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers without a sliding window, and of those with one; the same object where they do not differ."""
    if architecture.local_rope_theta is None:
        rope = _rope(raw, architecture, head_dim)
        return rope, rope
    both = raw.get("rope_parameters") or {}
    full = {**raw, "rope_parameters": both[_FULL]} if _FULL in both else dict(raw)
    local = both.get(_SLIDING) or {"rope_theta": raw.get("rope_local_base_freq", architecture.local_rope_theta)}
    local_raw = {**raw, "rope_scaling": None, "rope_parameters": local}
    return _rope(full, architecture, head_dim), _rope(local_raw, architecture, head_dim)


def _rope(raw: Mapping[str, Any], architecture: Architecture, head_dim: int) -> RopeConfig:
    """Old configs have `rope_theta` and `rope_scaling`, new ones put both into `rope_parameters`."""
    parameters = dict(raw.get("rope_scaling") or {})
    parameters.update(raw.get("rope_parameters") or {})
    rope_type = str(parameters.get("rope_type", parameters.get("type", "default")))
    rope_type = architecture.rope_aliases.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"config.json: rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    theta = _number(parameters, "rope_theta", raw.get("rope_theta", 10000.0))
    partial = _number(parameters, "partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ModelError(f"config.json: partial_rotary_factor {partial} rotates {rotary_dim} of {head_dim} channels")
    original = raw.get("original_max_position_embeddings")
    if original is not None:
        parameters.setdefault("original_max_position_embeddings", original)
    return RopeConfig(rope_type, theta, rotary_dim, parameters)


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


def _rotating_layers(raw: Mapping[str, Any], architecture: Architecture, num_layers: int) -> list[bool]:
    if not architecture.no_rope_layers:
        return [True] * num_layers
    flags = raw.get("no_rope_layers")  # named so, but 1 means that the layer rotates
    if flags is None:
        interval = _positive(raw, "no_rope_layer_interval")
        flags = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(flags) < num_layers:
        raise ModelError(f"config.json: no_rope_layers has {len(flags)} entries for {num_layers} layers")
    return [bool(flag) for flag in flags[:num_layers]]


def _layer_kinds(raw: Mapping[str, Any], architecture: Architecture, num_layers: int) -> list[str]:
    """As `layer_types` spells them, or would: which layers have the sliding window."""
    rule = architecture.sliding_window
    if rule == "none":
        return [_FULL] * num_layers
    if rule == "all":
        return [_FULL if raw.get("sliding_window") is None else _SLIDING] * num_layers
    is_used = raw.get("use_sliding_window", False) and raw.get("sliding_window") is not None
    if rule == "used" or (rule == "layer_types" and not is_used):
        return [_SLIDING if is_used else _FULL] * num_layers
    kinds = raw.get("layer_types")
    if kinds is None and rule == "pattern":
        period = _positive(raw, "sliding_window_pattern")
        kinds = [_SLIDING if (layer + 1) % period else _FULL for layer in range(num_layers)]
    elif kinds is None and architecture.no_rope_layers:
        kinds = [_FULL if rotates else _SLIDING for rotates in _rotating_layers(raw, architecture, num_layers)]
    elif kinds is None:
        first = raw.get("max_window_layers", num_layers)
        if architecture.windows_before_full:
            kinds = [_SLIDING if layer < first and layer % 2 == 0 else _FULL for layer in range(num_layers)]
        else:
            kinds = [_FULL if layer < first else _SLIDING for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {num_layers} layers")
    unknown = set(kinds) - {_FULL, _SLIDING}
    if unknown:
        raise ModelError(f"config.json: layer_types holds {sorted(unknown)}, which is not supported")
    return list(kinds)


def _scales(raw: Mapping[str, Any], architecture: Architecture, hidden_size: int, head_dim: int) -> Scales:
    if architecture.multipliers:
        return Scales(
            attention=_number(raw, "attention_multiplier", 1.0),
            embedding=_number(raw, "embedding_multiplier", 1.0),
            residual=_number(raw, "residual_multiplier", 1.0),
            logits=1.0 / _number(raw, "logits_scaling", 1.0),
        )

    def soft_cap(field: str) -> float | None:
        return _number(raw, field) if architecture.soft_caps and raw.get(field) is not None else None

    scalar = _number(raw, "query_pre_attn_scalar") if architecture.query_scalar else head_dim
    return Scales(
        attention=scalar**-0.5,
        embedding=hidden_size**0.5 if architecture.sqrt_embedding_scale else 1.0,
        attention_soft_cap=soft_cap("attn_logit_softcapping"),
        logits_soft_cap=soft_cap("final_logit_softcapping"),
    )
