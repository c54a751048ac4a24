"""Architectures as data: which linears share an input, and where a per-channel scale of that input folds to.

Nothing else in the package knows an architecture by name. A new one is an entry in ARCHITECTURES.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import Enum

from torch import nn
from transformers import PretrainedConfig

from quantizer.config import QuantizeError


class Fold(Enum):
    """How the module before a group of linears absorbs 1/s while their input columns are multiplied by s."""

    NORM = "norm"
    """Divide the norm's weight."""
    ROWS = "rows"
    """Divide the output rows (and bias) of a linear whose output enters the next one linearly."""
    KV_ROWS = "kv_rows"
    """As ROWS, but one row feeds the same channel of every query head of its group, so they share a scale."""


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Linears of one decoder layer that read the same input; names are relative to the layer."""

    previous: str
    linears: tuple[str, ...]
    fold: Fold


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `architectures` entry of config.json: where transformers keeps its modules, and its scale groups."""

    name: str
    model_type: str
    layer_class: str
    rotary_class: str
    groups: tuple[ScaleGroup, ...]
    unclipped: tuple[str, ...]
    """Linears whose weights are never clipped: errors of q and k meet in a product, where they do not average out."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group.linears)

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


def _gated_decoder(prefix: str, model_type: str) -> Architecture:
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    return Architecture(
        name=f"{prefix}ForCausalLM",
        model_type=model_type,
        layer_class=f"{module}:{prefix}DecoderLayer",
        rotary_class=f"{module}:{prefix}RotaryEmbedding",
        groups=_GATED_DECODER,
        unclipped=("self_attn.q_proj", "self_attn.k_proj"),
    )


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _gated_decoder("Llama", "llama"),
        _gated_decoder("Mistral", "mistral"),
        _gated_decoder("Qwen2", "qwen2"),
        _gated_decoder("Qwen3", "qwen3"),
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


def _resolve(path: str) -> type[nn.Module]:
    module, _, name = path.partition(":")
    resolved: type[nn.Module] = getattr(importlib.import_module(module), name)
    return resolved
