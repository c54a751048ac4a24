"""The decoders that are served, as data: what the code must know of a model type that its config.json does not say.

A new one is a row of `ARCHITECTURES`: flags on one decoder and the names of its tensors, not a class of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Names of a layer's norms; None where it has none."""

    input: str | None = "input_layernorm"
    """Of what attention reads."""
    attention_output: str | None = None
    """Of what attention gives, before it is added to the residual stream."""
    mlp_input: str | None = "post_attention_layernorm"
    mlp_output: str | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.input, self.attention_output, self.mlp_input, self.mlp_output) if name)


_SEPARATE_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SEPARATE_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_FUSED_GATE_UP = ("mlp.gate_up_proj",)


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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model type."""

    models: str
    """What people call them, for the page of supported models."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields that a config.json of this type may leave out though the decoder needs them."""
    qkv: tuple[str, ...] = _SEPARATE_QKV
    gate_up: tuple[str, ...] = _SEPARATE_GATE_UP
    """Modules of a layer that are computed as one linear, in the order of their outputs; one, where the checkpoint fuses them."""
    norms: LayerNorms = LayerNorms()
    unit_offset_norms: bool = False
    """Norms multiply by 1 + weight."""
    qkv_bias: bool | None = False  # None: config.json's `attention_bias` says
    o_bias: bool | None = False
    qk_norm: Literal["none", "each head", "all heads"] = "none"
    sliding_window: Literal["none", "all", "used", "layer_types", "pattern"] = "none"
    """Which layers have `sliding_window`: all; all, if `use_sliding_window`; those that `layer_types` names, if
    `use_sliding_window`; those that it names, or that are not the last of each `sliding_window_pattern`."""
    windows_before_full: bool = False
    """Without `layer_types`, every other layer below `max_window_layers` has the window, and not all from there on."""
    activation: str = "hidden_act"
    """The field that names it."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Older names of RoPE types."""
    interleaved_rope: bool = False
    """Pairs that rotate are (2i, 2i + 1), not (i, i + half)."""
    local_rope_theta: float | None = None
    """Layers with a sliding window have an unscaled RoPE of their own; its base, if config.json does not say."""
    no_rope_layers: bool = False
    """Some layers rotate nothing; `no_rope_layers` or `no_rope_layer_interval` says which."""
    stated_context: bool = False
    """`max_position_embeddings` counts what the RoPE type stretches the context to."""
    sqrt_embedding_scale: bool = False
    """Embeddings are multiplied by the root of the hidden size."""
    query_scalar: bool = False
    """Scores are scaled by `query_pre_attn_scalar` in place of the head size."""
    soft_caps: bool = False
    """`attn_logit_softcapping` and `final_logit_softcapping` hold."""
    multipliers: bool = False
    """`embedding_multiplier`, `attention_multiplier`, `residual_multiplier` and `logits_scaling` hold."""
    mixture: MixtureNames | None = None
    """In place of some or all layers' MLPs."""


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

_GEMMA_NORMS = LayerNorms(
    attention_output="post_attention_layernorm",
    mlp_input="pre_feedforward_layernorm",
    mlp_output="post_feedforward_layernorm",
)
_GEMMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("Llama 1, 2, 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama; Yi", qkv_bias=None, o_bias=None),
    "mistral": Architecture("Mistral 7B, Nemo, Small 3", sliding_window="all"),
    "qwen2": Architecture("Qwen2, Qwen2.5", qkv_bias=True, sliding_window="layer_types"),
    "qwen3": Architecture("Qwen3", qkv_bias=None, o_bias=None, qk_norm="each head", sliding_window="layer_types"),
    "mixtral": Architecture("Mixtral 8x7B, 8x22B", sliding_window="all", mixture=_MIXTRAL_MIXTURE),
    "qwen2_moe": Architecture(
        "Qwen1.5-MoE, Qwen2-MoE",
        qkv_bias=True,
        sliding_window="layer_types",
        windows_before_full=True,
        mixture=replace(_QWEN_MIXTURE, shared=True),
    ),
    "qwen3_moe": Architecture(
        "Qwen3-MoE",
        qkv_bias=None,
        o_bias=None,
        qk_norm="each head",
        sliding_window="used",
        mixture=_QWEN_MIXTURE,
    ),
    "gemma2": Architecture(
        "Gemma 2",
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norms=_GEMMA_NORMS,
        unit_offset_norms=True,
        qkv_bias=None,
        o_bias=None,
        sliding_window="pattern",
        activation="hidden_activation",
        sqrt_embedding_scale=True,
        query_scalar=True,
        soft_caps=True,
    ),
    "gemma3_text": Architecture(
        "Gemma 3 (text)",
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "sliding_window_pattern": 6,
        },
        norms=_GEMMA_NORMS,
        unit_offset_norms=True,
        qkv_bias=None,
        o_bias=None,
        qk_norm="each head",
        sliding_window="pattern",
        activation="hidden_activation",
        local_rope_theta=10000.0,
        stated_context=True,
        sqrt_embedding_scale=True,
        query_scalar=True,
    ),
    "phi3": Architecture(
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        defaults={"original_max_position_embeddings": 4096},
        qkv=("self_attn.qkv_proj",),
        gate_up=_FUSED_GATE_UP,
        sliding_window="all",
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
    "granite": Architecture("Granite 3.x", qkv_bias=None, o_bias=None, multipliers=True),
    "olmo2": Architecture(
        "OLMo 2",
        norms=LayerNorms(
            input=None,
            attention_output="post_attention_layernorm",
            mlp_input=None,
            mlp_output="post_feedforward_layernorm",
        ),
        qkv_bias=None,
        o_bias=None,
        qk_norm="all heads",
    ),
    "glm4": Architecture(
        "GLM-4-0414 (9B, 32B)",
        defaults={"partial_rotary_factor": 0.5, "attention_bias": True, "head_dim": 128, "rms_norm_eps": 1.5625e-7},
        gate_up=_FUSED_GATE_UP,
        norms=LayerNorms(attention_output="post_self_attn_layernorm", mlp_output="post_mlp_layernorm"),
        qkv_bias=None,
        interleaved_rope=True,
    ),
    "smollm3": Architecture(
        "SmolLM3",
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4},
        qkv_bias=None,
        o_bias=None,
        sliding_window="layer_types",
        no_rope_layers=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model type that holds one of the decoders beside other things, which are not served and whose tensors are passed over."""

    model_type: str
    """Of the decoder, whose fields are config.json's `text_config`."""
    prefixes: tuple[tuple[str, str], ...]
    """Beginnings of the decoder's tensor names, as stored and as the decoder's own model type has them; the first that fits."""
    ignored: tuple[str, ...]
    """Beginnings of the others' names."""
    ignored_as: str

    def rename(self, name: str) -> str | None:
        """A tensor's name in the decoder; None for the others' tensors."""
        if name.startswith(self.ignored):
            return None
        for stored, own in self.prefixes:
            if name.startswith(stored):
                return own + name.removeprefix(stored)
        return name


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper(
        "gemma3_text",
        prefixes=(("language_model.", ""), ("model.language_model.", "model.")),
        ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        ignored_as="the vision tower",
    ),
}
