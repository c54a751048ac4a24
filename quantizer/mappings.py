"""Architectures as data: which linears share an input, and where a per-channel scale of that input folds to.

Nothing else in the package knows an architecture by name. A new one is an entry in ARCHITECTURES.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from quantizer.config import QuantizeError


class Fold(Enum):
    """How the module before a group of linears absorbs 1/s while their input columns are multiplied by s."""

    NORM = "norm"
    """Divide the norm's weight."""
    UNIT_NORM = "unit_norm"
    """The norm multiplies by 1 + weight: divide that."""
    ROWS = "rows"
    """Divide the output rows (and bias) of a linear whose output enters the next one linearly."""
    KV_ROWS = "kv_rows"
    """As ROWS, but one row feeds the same channel of every query head of its group, so they share a scale."""
    NONE = "none"
    """Nothing does: the linears read the residual stream itself. They are rounded unscaled."""


class Rows(Enum):
    """A range of the output rows of a linear, for those that checkpoints fuse."""

    ALL = "all"
    VALUES = "values"
    """Of queries, keys and values."""
    QUERIES_AND_KEYS = "queries_and_keys"
    UPS = "ups"
    """Of gates and ups."""

    def of(self, config: PretrainedConfig, num_rows: int) -> slice:
        kv_size = config.num_key_value_heads * head_size(config)
        match self:
            case Rows.VALUES:
                return slice(num_rows - kv_size, num_rows)
            case Rows.QUERIES_AND_KEYS:
                return slice(num_rows - kv_size)
            case Rows.UPS:
                return slice(num_rows // 2, num_rows)
            case _:
                return slice(num_rows)


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears of one decoder layer that read the same input; names are relative to the layer."""

    previous: str  # empty where nothing folds
    linears: tuple[str, ...]
    fold: Fold
    rows: Rows = Rows.ALL
    """Of `previous`, where that is a linear."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts: a linear per expert in the checkpoint, stacked parameters in transformers' layer."""

    module: str
    """In the layer, as the checkpoint has it; in transformers it is `mlp`."""
    gate: str
    up: str
    down: str
    """Linears of an expert."""
    shared: bool = False
    """Whether there is an expert for all tokens, `shared_expert`, weighted by `shared_expert_gate`."""

    @property
    def routers(self) -> tuple[str, ...]:
        """What decides on experts and their weights; it stays in 16 bit."""
        return (f"{self.module}.gate", *((f"{self.module}.shared_expert_gate",) if self.shared else ()))

    def experts(self, num_experts: int) -> tuple[str, ...]:
        """Names of a layer's experts, the shared one last."""
        names = [f"{self.module}.experts.{index}" for index in range(num_experts)]
        return (*names, *((f"{self.module}.shared_expert",) if self.shared else ()))

    def groups(self, num_experts: int) -> tuple[ScaleGroup, ...]:
        """All experts and the routers read the norm's output, which can be divided but once; each expert's down its own up's."""
        experts = self.experts(num_experts)
        readers = tuple(f"{expert}.{linear}" for expert in experts for linear in (self.gate, self.up))
        return (
            ScaleGroup("post_attention_layernorm", (*readers, *self.routers), Fold.NORM),
            *(ScaleGroup(f"{expert}.{self.up}", (f"{expert}.{self.down}",), Fold.ROWS) for expert in experts),
        )


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `architectures` entry of config.json: where transformers keeps its modules, and its scale groups."""

    name: str
    model_type: str
    layer_class: str
    rotary_class: str
    groups: tuple[ScaleGroup, ...]
    unclipped: Mapping[str, Rows]
    """Rows of linears that are never clipped: errors of q and k meet in a product, where they do not average out."""
    mixture: Mixture | None = None
    """In place of some or all layers' MLPs."""
    embedding_scale: Callable[[PretrainedConfig], float] = lambda config: 1.0
    """What the first layer reads is the embedding times this."""
    rotary_by_layer_type: bool = False
    """Layers with a sliding window rotate by other angles."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    def layer_groups(self, config: PretrainedConfig, index: int) -> tuple[ScaleGroup, ...]:
        """The scale groups of one layer: its MLP is a mixture or not."""
        if self.mixture is None or not _is_mixture(config, index):
            return self.groups
        others = tuple(group for group in self.groups if not group.linears[0].startswith("mlp."))
        return (*others, *self.mixture.groups(num_experts(config)))

    def layer_linears(self, config: PretrainedConfig, index: int) -> tuple[str, ...]:
        return tuple(name for group in self.layer_groups(config, index) for name in group.linears)

    def routers(self, config: PretrainedConfig) -> tuple[str, ...]:
        """Names that stand for every layer's routers, and by their substrings for nothing else."""
        layers = [index for index in range(config.num_hidden_layers) if _is_mixture(config, index)]
        if self.mixture is None or not layers:
            return ()
        if len(layers) == config.num_hidden_layers:
            return self.mixture.routers
        # Some layers have linears that begin like a router: mlp.gate_proj.
        return tuple(f"{self.layer_prefix(index)}{router}" for index in layers for router in self.mixture.routers)

    @property
    def layer_type(self) -> type[nn.Module]:
        return _resolve(self.layer_class)

    @property
    def rotary_type(self) -> type[nn.Module]:
        return _resolve(self.rotary_class)


_GATED_DECODER = (
    ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Fold.NORM),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), Fold.KV_ROWS),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), Fold.NORM),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",), Fold.ROWS),
)


def num_experts(config: PretrainedConfig) -> int:
    """Of a layer that is a mixture, a shared one not counted."""
    return int(getattr(config, "num_local_experts", None) or config.num_experts)


def _is_mixture(config: PretrainedConfig, index: int) -> bool:
    dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    return index not in dense and (index + 1) % step == 0


_MIXTRAL_MIXTURE = Mixture("block_sparse_moe", gate="w1", up="w3", down="w2")
_QWEN_MIXTURE = Mixture("mlp", gate="gate_proj", up="up_proj", down="down_proj")


_SEPARATE_QK = {"self_attn.q_proj": Rows.ALL, "self_attn.k_proj": Rows.ALL}

_SANDWICHED = (
    ScaleGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Fold.UNIT_NORM),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), Fold.KV_ROWS),
    ScaleGroup("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj"), Fold.UNIT_NORM),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",), Fold.ROWS),
)
"""Gemma's: the norms of what the sublayers give take no part."""

_FUSED = (
    ScaleGroup("input_layernorm", ("self_attn.qkv_proj",), Fold.NORM),
    ScaleGroup("self_attn.qkv_proj", ("self_attn.o_proj",), Fold.KV_ROWS, Rows.VALUES),
    ScaleGroup("post_attention_layernorm", ("mlp.gate_up_proj",), Fold.NORM),
    ScaleGroup("mlp.gate_up_proj", ("mlp.down_proj",), Fold.ROWS, Rows.UPS),
)

_FUSED_GATE_UP = (*_GATED_DECODER[:2], *_FUSED[2:])

_NORMS_AFTER = (
    ScaleGroup("", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Fold.NONE),
    ScaleGroup("self_attn.v_proj", ("self_attn.o_proj",), Fold.KV_ROWS),
    ScaleGroup("", ("mlp.gate_proj", "mlp.up_proj"), Fold.NONE),
    ScaleGroup("mlp.up_proj", ("mlp.down_proj",), Fold.ROWS),
)


def _root_of_hidden_size(config: PretrainedConfig) -> float:
    return float(config.hidden_size**0.5)


def _embedding_multiplier(config: PretrainedConfig) -> float:
    return float(config.embedding_multiplier)


def _gated_decoder(
    prefix: str,
    model_type: str,
    groups: tuple[ScaleGroup, ...] = _GATED_DECODER,
    unclipped: Mapping[str, Rows] = _SEPARATE_QK,
    **flags: Any,
) -> Architecture:
    package = model_type.removesuffix("_text")
    module = f"transformers.models.{package}.modeling_{package}"
    return Architecture(
        name=f"{prefix}ForCausalLM",
        model_type=model_type,
        layer_class=f"{module}:{prefix}DecoderLayer",
        rotary_class=f"{module}:{prefix}RotaryEmbedding",
        groups=groups,
        unclipped=unclipped,
        **flags,
    )


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _gated_decoder("Llama", "llama"),
        _gated_decoder("Mistral", "mistral"),
        _gated_decoder("Qwen2", "qwen2"),
        _gated_decoder("Qwen3", "qwen3"),
        _gated_decoder("Mixtral", "mixtral", mixture=_MIXTRAL_MIXTURE),
        _gated_decoder("Qwen2Moe", "qwen2_moe", mixture=replace(_QWEN_MIXTURE, shared=True)),
        _gated_decoder("Qwen3Moe", "qwen3_moe", mixture=_QWEN_MIXTURE),
        _gated_decoder("Gemma2", "gemma2", _SANDWICHED, embedding_scale=_root_of_hidden_size),
        _gated_decoder(
            "Gemma3", "gemma3_text", _SANDWICHED, embedding_scale=_root_of_hidden_size, rotary_by_layer_type=True
        ),
        _gated_decoder("Phi3", "phi3", _FUSED, {"self_attn.qkv_proj": Rows.QUERIES_AND_KEYS}),
        _gated_decoder("Granite", "granite", embedding_scale=_embedding_multiplier),
        _gated_decoder("Olmo2", "olmo2", _NORMS_AFTER),
        _gated_decoder("Glm4", "glm4", _FUSED_GATE_UP),
        _gated_decoder("SmolLM3", "smollm3"),
    )
}


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model type that holds a decoder beside other things: the decoder alone is quantized, as a checkpoint of its own type."""

    architecture: str
    prefixes: tuple[tuple[str, str], ...]
    """Beginnings of the decoder's tensor names, as stored and as the decoder's own type has them; the first that fits."""
    ignored: tuple[str, ...]
    """Beginnings of the others' names."""

    def rename(self, name: str) -> str | None:
        if name.startswith(self.ignored):
            return None
        for stored, own in self.prefixes:
            if name.startswith(stored):
                return own + name.removeprefix(stored)
        return name

    def config(self, outer: Mapping[str, Any]) -> dict[str, Any]:
        """The decoder's config.json."""
        kept = {field: outer[field] for field in ("eos_token_id", "torch_dtype", "dtype") if field in outer}
        model_type = ARCHITECTURES[self.architecture].model_type
        return {**outer["text_config"], **kept, "model_type": model_type, "architectures": [self.architecture]}


WRAPPERS = {
    "gemma3": Wrapper(
        "Gemma3ForCausalLM",
        prefixes=(("language_model.", ""), ("model.language_model.", "model.")),
        ignored=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    )
}


def find_architecture(config: PretrainedConfig) -> Architecture:
    """The entry for a config, by `architectures` or else by `model_type`. QuantizeError names what is unsupported."""
    names = list(getattr(config, "architectures", None) or [])
    found = [ARCHITECTURES[name] for name in names if name in ARCHITECTURES]
    if not names:
        found = [entry for entry in ARCHITECTURES.values() if entry.model_type == config.model_type]
    if not found or found[0].model_type != config.model_type:
        described = ", ".join(names) or "none named"
        raise QuantizeError(
            f"architecture {described} (model_type {config.model_type}) is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return found[0]


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_implementation(config: PretrainedConfig) -> str:
    """Of transformers, that computes the model as it is: only the eager one caps scores."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else "sdpa"


def _resolve(path: str) -> type[nn.Module]:
    module, _, name = path.partition(":")
    resolved: type[nn.Module] = getattr(importlib.import_module(module), name)
    return resolved
