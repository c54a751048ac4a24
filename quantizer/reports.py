"""What is said about a quantized layer: the rows of quantization_report.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """What the search chose for one group of linears; errors are relative, tr(dW H dWT) / tr(W H WT), both over the rows
    searched."""

    previous: str
    linears: tuple[str, ...]
    formula: str
    exponent: float
    error_identity: float
    error: float


@dataclass(frozen=True, slots=True)
class LinearReport:
    """Relative output error tr(dW H dWT) / tr(W H WT) of one linear, by plain rounding and as written.

    clipped: the share of its (row, group) pairs whose range was shrunk.
    """

    name: str
    error_nearest: float
    error: float
    clipped: float


@dataclass(slots=True)
class LayerReport:
    layer: int
    scales: list[ScaleReport] = field(default_factory=list)
    linears: list[LinearReport] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """What was tried and did not help, so was not done."""
    seconds: float = 0.0

    @property
    def error_nearest(self) -> float:
        return sum(linear.error_nearest for linear in self.linears) / max(1, len(self.linears))

    @property
    def error(self) -> float:
        return sum(linear.error for linear in self.linears) / max(1, len(self.linears))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the means over the linears too."""
        return {**asdict(self), "error_nearest": self.error_nearest, "error": self.error}
