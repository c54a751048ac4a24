"""Tables of rotary embeddings (RoPE, arXiv 2104.09864) for every supported scaling."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from server.model_config import ModelError, RopeConfig

logger = logging.getLogger(__name__)


def rotary_table(rope: RopeConfig, max_positions: int, max_model_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [max_model_len, rotary_dim / 2], the attention scaling multiplied in. max_positions: config.json's.

    The types whose frequencies depend on the length ("dynamic", "longrope") are fixed once, for `max_model_len`: a token's
    position then never changes its meaning while a sequence grows, and cached keys stay valid.
    """
    frequencies, scaling = _frequencies(rope, max_positions, max_model_len)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies.float()
    return angles.cos() * scaling, angles.sin() * scaling


def _frequencies(rope: RopeConfig, max_positions: int, max_model_len: int) -> tuple[Tensor, float]:
    match rope.rope_type:
        case "default":
            return _inverse(rope.theta, rope.rotary_dim), 1.0
        case "linear":
            return _inverse(rope.theta, rope.rotary_dim) / _number(rope, "factor"), 1.0
        case "llama3":
            return _llama3(rope), 1.0
        case "yarn":
            return _yarn(rope, max_positions)
        case "dynamic":
            return _dynamic(rope, max_positions, max_model_len), 1.0
        case "longrope":
            return _longrope(rope, max_positions, max_model_len)
        case other:
            raise ModelError(f"config.json: rope type {other!r} is not supported")


def _inverse(theta: float, dim: int) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _number(rope: RopeConfig, field: str, default: float | None = None) -> float:
    value = rope.parameters.get(field)
    if value is None:
        value = default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"config.json: rope type {rope.rope_type!r} needs a number {field}, found {value!r}")
    return float(value)


def _llama3(rope: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    factor, original = _number(rope, "factor"), _number(rope, "original_max_position_embeddings")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    frequencies = _inverse(rope.theta, rope.rotary_dim)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    slowed = torch.where(wavelengths > original / low, frequencies / factor, frequencies)
    medium = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(medium, between, slowed)


def _yarn(rope: RopeConfig, max_positions: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), with DeepSeek's `mscale` where given."""
    factor = _number(rope, "factor")
    original = _number(rope, "original_max_position_embeddings", max_positions)
    fast, slow = _number(rope, "beta_fast", 32), _number(rope, "beta_slow", 1)
    dim, theta = rope.rotary_dim, rope.theta

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(fast), correction(slow)
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    extrapolated = _inverse(theta, dim)
    frequencies = extrapolated / factor * ramp + extrapolated * (1 - ramp)

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention = rope.parameters.get("attention_factor")
    if attention is None:
        each, all_dims = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
        attention = mscale(factor, each) / mscale(factor, all_dims) if each and all_dims else mscale(factor)
    return frequencies, float(attention)


def _dynamic(rope: RopeConfig, max_positions: int, max_model_len: int) -> Tensor:
    """NTK-aware scaling of the base, as if every sequence were `max_model_len` long."""
    factor = _number(rope, "factor")
    original = _number(rope, "original_max_position_embeddings", max_positions)
    length = max(float(max_model_len), original)
    theta = rope.theta * (factor * length / original - (factor - 1)) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    logger.info("rope type dynamic: base %.6g -> %.6g, fixed for max_model_len %d", rope.theta, theta, max_model_len)
    return _inverse(theta, rope.rotary_dim)


def _longrope(rope: RopeConfig, max_positions: int, max_model_len: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): the long factors for a `max_model_len` past the original context, else the short ones."""
    original = _number(rope, "original_max_position_embeddings", max_positions)
    kind = "long_factor" if max_model_len > original else "short_factor"
    factors = rope.parameters.get(kind)
    if not isinstance(factors, list) or len(factors) != rope.rotary_dim // 2:
        raise ModelError(f"config.json: rope type 'longrope' needs {kind} with {rope.rotary_dim // 2} numbers")
    factor = _number(rope, "factor", max_positions / original)
    attention = rope.parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    logger.info("rope type longrope: %s for max_model_len %d (original context %d)", kind, max_model_len, int(original))
    return _inverse(rope.theta, rope.rotary_dim) / torch.tensor(factors, dtype=torch.float32), float(attention)
