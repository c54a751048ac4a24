"""What a quantization is asked to do, and what the checkpoint says was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

GROUP_SIZES = (32, 64, 128, -1)
"""Inputs that share one scale and zero point; -1 is the whole row."""

METHODS = ("awq", "rtn")
ROUNDINGS = ("nearest", "feedback")
DTYPES = ("auto", "float16", "bfloat16")


class QuantizeError(ValueError):
    """Something the user can mend: a source, an option or a tensor that cannot be quantized as asked."""


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The `quantization_config` of an AWQ gemm checkpoint's config.json."""

    group_size: int
    modules_to_not_convert: tuple[str, ...] = ()
    bits: int = 4
    zero_point: bool = True
    version: str = "gemm"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; an empty list of unconverted modules is null, as other tools write it."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": self.version,
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Parses a checkpoint's quantization_config; QuantizeError names the field that is not the AWQ gemm format."""
        expected = {"quant_method": ("awq",), "bits": (4,), "zero_point": (True,), "version": ("gemm", "GEMM")}
        for field, allowed in expected.items():
            value = data.get(field, allowed[0] if field == "version" else None)
            if value not in allowed:
                raise QuantizeError(f"quantization_config.{field}: expected {allowed[0]!r}, found {value!r}")
        group_size = data.get("group_size")
        if not isinstance(group_size, int) or (group_size != -1 and group_size <= 0):
            raise QuantizeError(
                f"quantization_config.group_size: expected a positive integer or -1, found {group_size!r}"
            )
        return cls(group_size, tuple(data.get("modules_to_not_convert") or ()))

    def converts(self, module: str) -> bool:
        """Whether the linear of this full name is quantized. Names match by substring, as in every AWQ loader."""
        return not any(skipped in module for skipped in self.modules_to_not_convert)


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Everything that decides the written integers, apart from the source. Defaults are the command's."""

    group_size: int = 128
    method: str = "awq"
    scales: bool = True
    clip: bool = True
    rounding: str = "feedback"
    calibration: str = "builtin"
    samples: int = 28
    sequence_length: int = 512
    seed: int = 0
    dtype: str = "auto"
    modules_to_not_convert: tuple[str, ...] = ()
    max_shard_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("method", self.method, METHODS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("dtype", self.dtype, DTYPES)
        for field, minimum in (("samples", 1), ("sequence_length", 8), ("max_shard_bytes", 1)):
            value = getattr(self, field)
            if value < minimum:
                raise QuantizeError(f"{field}: {value} is below the minimum of {minimum}")

    @property
    def quant_config(self) -> QuantConfig:
        """What config.json will say. A non-empty list must name lm_head too: readers take the list as complete."""
        skipped = self.modules_to_not_convert
        if skipped and "lm_head" not in skipped:
            skipped = (*skipped, "lm_head")
        return QuantConfig(self.group_size, skipped)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def resolved(self) -> QuantizeOptions:
        """Round-to-nearest written out: method `rtn` is no scales, no clip, nearest rounding."""
        if self.method != "rtn":
            return self
        fields = {**asdict(self), "scales": False, "clip": False, "rounding": "nearest"}
        return QuantizeOptions(**fields)


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise QuantizeError(f"{field}: {value!r} is not one of {', '.join(map(str, allowed))}")
