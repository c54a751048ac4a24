"""Folding a scale: the input columns of some linears times s, and whatever feeds them divided by it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from quantizer.device import CPU
from quantizer.mappings import Fold, ScaleGroup, head_size


def shared_channels(config: PretrainedConfig, group: ScaleGroup, device: torch.device = CPU) -> Tensor | None:
    """For each input channel of the group, the index of the scale it must use; None where each has its own.

    Under grouped-query attention channel d of query head h reads row d of KV head h // (heads per KV head).
    """
    if group.fold is not Fold.KV_ROWS:
        return None
    num_heads = config.num_attention_heads
    size = head_size(config)
    heads_per_kv = num_heads // config.num_key_value_heads
    kv_heads = torch.arange(num_heads, device=device) // heads_per_kv
    return (kv_heads[:, None] * size + torch.arange(size, device=device)).reshape(-1)


def fold(
    tensors: dict[str, Tensor],
    group: ScaleGroup,
    scales: Tensor,
    dtype: torch.dtype,
    config: PretrainedConfig,
) -> tuple[Tensor, Tensor]:
    """Replaces the layer's tensors (fp32, names relative to the layer) by folded ones; the layer computes the same.

    dtype: what the norm is stored as. A norm's folded weight is rounded to it first and the scale taken from the
    rounded value, so that storing it costs nothing. Returns the scales used, [K], all 1 where nothing folds, and what each
    output row of `group.previous` was divided by (empty where that is no linear).
    """
    name, rows = f"{group.previous}.weight", scales.new_empty(0)
    if group.fold is Fold.NONE:
        return torch.ones_like(scales), rows
    if group.fold in (Fold.NORM, Fold.UNIT_NORM):
        offset = 1.0 if group.fold is Fold.UNIT_NORM else 0.0
        tensors[name], scales = _fold_norm(tensors[name], offset, scales, dtype)
    else:
        shared = shared_channels(config, group, scales.device)
        rows = scales.new_ones(len(tensors[name]))
        rows[group.rows.of(config, rows.shape[0])] = scales if shared is None else _per_row(scales, shared)
        tensors[name] = tensors[name] / rows[:, None]
        bias = f"{group.previous}.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] / rows
    for linear in group.linears:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"] * scales
    return scales, rows


def _fold_norm(weight: Tensor, offset: float, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stored weight of a norm that multiplies by offset + weight, and the scales it stands for."""
    folded = ((weight + offset) / scales - offset).to(dtype).float()
    # A channel whose folded weight leaves the dtype's range keeps its own weight and goes unscaled.
    usable = torch.isfinite(folded) & ((folded + offset).abs() >= torch.finfo(dtype).tiny)
    folded = torch.where(usable, folded, weight.to(dtype).float())
    return folded, torch.where(folded + offset != 0, (weight + offset) / (folded + offset), torch.ones_like(weight))


def _per_row(scales: Tensor, shared: Tensor) -> Tensor:
    """One value per row of the previous linear, from scales that agree wherever `shared` does."""
    rows = scales.new_empty(int(shared.max()) + 1)
    rows[shared] = scales
    return rows
