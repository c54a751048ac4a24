"""Between the two forms of a mixture of experts: a linear per expert in checkpoints, stacked parameters in transformers' layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantizer.mappings import Architecture, Mixture

_LOADED = re.compile(r"(?P<layer>.*)mlp\.(?P<rest>experts\.(?:gate_up_proj|down_proj)|gate\.weight)")


def checkpoint_shapes(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint, from those of transformers' model."""
    mixture = architecture.mixture
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = _LOADED.fullmatch(name)
        if mixture is None or match is None:
            found[name] = shape
            continue
        module = f"{match['layer']}{mixture.module}"
        if match["rest"] == "gate.weight":
            found[f"{module}.gate.weight"] = shape
            continue
        for expert in (f"{module}.experts.{index}" for index in range(shape[0])):
            if match["rest"] == "experts.down_proj":
                found[f"{expert}.{mixture.down}.weight"] = shape[1:]
            else:
                for linear in (mixture.gate, mixture.up):
                    found[f"{expert}.{linear}.weight"] = (shape[1] // 2, shape[2])
    return found


def loaded_tensors(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' layer or model takes, from a checkpoint's tensors; names may have any prefix."""
    if architecture.mixture is None:
        return dict(tensors)
    mixture, found = architecture.mixture, {}
    experts = re.compile(rf"(?P<layer>.*){re.escape(mixture.module)}\.experts\.(?P<index>\d+)\.(?P<linear>\w+)\.weight")
    router = re.compile(rf"(?P<layer>.*){re.escape(mixture.module)}\.gate\.weight")
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if match := experts.fullmatch(name):
            counts[match["layer"]] = max(counts.get(match["layer"], 0), int(match["index"]) + 1)
        elif match := router.fullmatch(name):
            found[f"{match['layer']}mlp.gate.weight"] = tensor
        else:
            found[name] = tensor
    for layer, count in counts.items():
        names = [f"{layer}{mixture.module}.experts.{index}" for index in range(count)]
        gates, ups, downs = (
            [tensors[f"{name}.{linear}.weight"] for name in names]
            for linear in (mixture.gate, mixture.up, mixture.down)
        )
        found[f"{layer}mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        )
        found[f"{layer}mlp.experts.down_proj"] = torch.stack(downs)
    return found


def down_input(
    mixture: Mixture, tensors: Mapping[str, Tensor], down: str, hidden: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """What an expert's linear `down` reads of `hidden` [tokens, K], every token taken to be the expert's. tensors: the layer's."""
    expert = down.rpartition(".")[0]
    gate, up = (tensors[f"{expert}.{linear}.weight"] for linear in (mixture.gate, mixture.up))
    return activation(hidden @ gate.t()) * (hidden @ up.t())
