"""Architectures as data: which linears share an input, and where a per-channel scale of that input folds to.

Nothing else in the package knows an architecture by name. A new one is an entry in ARCHITECTURES.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
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
    unclipped: tuple[str, ...]
    """Linears whose weights are never clipped: errors of q and k meet in a product, where they do not average out."""
    mixture: Mixture | None = None
    """In place of some or all layers' MLPs."""
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


def _gated_decoder(prefix: str, model_type: str, mixture: Mixture | None = None) -> Architecture:
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    return Architecture(
        name=f"{prefix}ForCausalLM",
        model_type=model_type,
        layer_class=f"{module}:{prefix}DecoderLayer",
        rotary_class=f"{module}:{prefix}RotaryEmbedding",
        groups=_GATED_DECODER,
        unclipped=("self_attn.q_proj", "self_attn.k_proj"),
        mixture=mixture,
    )


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        _gated_decoder("Llama", "llama"),
        _gated_decoder("Mistral", "mistral"),
        _gated_decoder("Qwen2", "qwen2"),
        _gated_decoder("Qwen3", "qwen3"),
        _gated_decoder("Mixtral", "mixtral", _MIXTRAL_MIXTURE),
        _gated_decoder("Qwen2Moe", "qwen2_moe", replace(_QWEN_MIXTURE, shared=True)),
        _gated_decoder("Qwen3Moe", "qwen3_moe", _QWEN_MIXTURE),
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
