"""Per layer: capture, search, fold, round, pack. One decoder layer of weights is in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.format import AwqWeight, pack_int4
from quantizer.calibrate import InputStatistics, LayerRunner
from quantizer.config import EFFORTS, QuantConfig, QuantizeError, QuantizeOptions
from quantizer.device import CPU
from quantizer.folding import fold, shared_channels
from quantizer.layouts import packed_tensors
from quantizer.mappings import Architecture, Fold, ScaleGroup
from quantizer.refinement import refine
from quantizer.reports import LayerReport, LinearReport, ScaleReport
from quantizer.rounding import Rounded, damping_for, nearest_values, round_feedback, round_nearest
from quantizer.search import RangeChooser, ScaleChoice, output_error, search_scales
from quantizer.sources import Source, load_checked

MAX_ROUNDED_ROWS = 1 << 16
"""Of linears that are rounded at once: more than any dense layer's share an input, fewer than the experts of a large mixture."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A finished layer: tensors to write, under their full names, its report, and the hidden states it gives to the next
    (None after the last)."""

    tensors: dict[str, Tensor]
    report: LayerReport
    hidden: Tensor | None = None


@dataclass(slots=True)
class LayerQuantizer:
    """Quantizes decoder layers in order, each on the hidden states the quantized layers before it give.

    A layer's weights, its statistics and all that is made of them are on `device`; hidden states and results are in host memory.
    """

    source: Source
    architecture: Architecture
    options: QuantizeOptions
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self.options = self.options.resolved()

    @property
    def quant_config(self) -> QuantConfig:
        return self.options.quant_config

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [sequences, length]. What enters the first layer, fp32 [sequences, length, hidden size]."""
        embedding = f"{self.architecture.embedding}.weight"
        rows = load_checked(self.source, embedding, self.shapes[embedding])[tokens].float()
        return rows * self.architecture.embedding_scale(self.source.config)

    def layers(self, hidden: Tensor, first: int = 0) -> Iterator[LayerResult]:
        """hidden: what enters layer `first`. Yields a result per layer as it is done."""
        runner = LayerRunner(self.source.config, self.architecture, self.device)
        num_layers = self.source.config.num_hidden_layers
        for index in range(first, num_layers):
            started = time.monotonic()
            tensors = self._load_layer(index)
            result, dense = self.quantize_layer(index, tensors, runner.capture(index, tensors, hidden))
            del tensors
            is_last = index + 1 == num_layers
            if not is_last:
                hidden = runner.run(runner.build(index, dense), index, hidden)
            if not torch.isfinite(hidden).all():
                raise QuantizeError(f"layer {index}: its output is not finite; the source's weights overflow in fp32")
            result.report.seconds = time.monotonic() - started
            yield replace(result, hidden=None if is_last else hidden)

    def _load_layer(self, index: int) -> dict[str, Tensor]:
        prefix = self.architecture.layer_prefix(index)
        return {
            name.removeprefix(prefix): load_checked(self.source, name, shape).to(self.device).float()
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }

    def quantize_layer(
        self, index: int, tensors: dict[str, Tensor], statistics: Iterable[tuple[ScaleGroup, InputStatistics]]
    ) -> tuple[LayerResult, dict[str, Tensor]]:
        """tensors: the layer's, fp32, names relative to it; statistics: of each of its scale groups.

        Returns what to write and the layer as a server will compute it, in fp32.
        """
        report, groups = LayerReport(index), self.architecture.layer_groups(self.source.config, index)
        folded, row_scales, waiting = dict(tensors), dict[str, Tensor](), []
        rounded: dict[str, tuple[AwqWeight, LinearReport]] = {}
        for group, inputs in statistics:
            choice = self._search(index, group, tensors, inputs)
            wanted = torch.ones_like(inputs.mean_abs) if choice is None else choice.scales
            scales, rows = fold(folded, group, wanted, self.dtype, self.source.config)
            if rows.numel():
                row_scales[group.previous] = rows
            if group.fold is Fold.NONE:
                report.skipped.append(f"scales of {', '.join(group.linears)}: nothing before them can take one")
            if choice is not None:
                report.scales.append(_scale_report(group, choice))
                if choice.is_identity:
                    report.skipped.append(f"scales of {', '.join(group.linears)}")
            waiting.append((group, inputs, scales))
            # Rounded as soon as no fold to come can change it, so that few statistics are held: each expert has its own.
            if not any(other.previous in group.linears for other in groups):
                rounded |= self._finish(index, *waiting.pop(), tensors, folded, row_scales)
            del inputs
        while waiting:
            rounded |= self._finish(index, *waiting.pop(0), tensors, folded, row_scales)
        dense = {name: self._as_stored(index, name, tensor, rounded) for name, tensor in folded.items()}
        written = {f"{self.architecture.layer_prefix(index)}{name}": tensor for name, tensor in dense.items()}
        for linear in (linear for group in groups for linear in group.linears if linear in rounded):
            weight, linear_report = rounded[linear]
            del written[f"{weight.name}.weight"]
            written |= packed_tensors(weight, self.options.format)
            dense[f"{linear}.weight"] = weight.dequantize()
            report.linears.append(linear_report)
            if self._clipped_rows(linear, weight.out_features).any() and linear_report.clipped == 0:
                report.skipped.append(f"clip of {linear}")
        written = {name: tensor.cpu() for name, tensor in written.items()}
        return LayerResult(written, report), {name: tensor.float() for name, tensor in dense.items()}

    def _finish(
        self,
        index: int,
        group: ScaleGroup,
        inputs: InputStatistics,
        scales: Tensor,
        tensors: dict[str, Tensor],
        folded: dict[str, Tensor],
        row_scales: dict[str, Tensor],
    ) -> dict[str, tuple[AwqWeight, LinearReport]]:
        """The group's quantized linears, rounded, and what that cost. scales: of its inputs, whose statistics become those of the
        scaled ones; row_scales: of linears' outputs."""
        found, inputs = {}, inputs.scaled(scales)
        for linear, (weight, clipped) in self._round(index, group, folded, inputs).items():
            effective = weight.dequantize()
            if linear in row_scales:
                effective *= row_scales[linear][:, None]
            original = tensors[f"{linear}.weight"]
            found[linear] = weight, self._linear_report(linear, original, effective, scales, inputs, clipped)
        return found

    def _search(
        self, index: int, group: ScaleGroup, tensors: dict[str, Tensor], inputs: InputStatistics
    ) -> ScaleChoice | None:
        """None where there is nothing to search for: no scales are wanted, or can be folded, or no linear is quantized."""
        weights = [tensors[f"{name}.weight"] for name in group.linears if self._converts(index, name)]
        channels = inputs.mean_abs.shape[0]
        if not weights or not self._scales(index, group) or group.fold is Fold.NONE:
            return None
        shared = shared_channels(self.source.config, group, self.device)
        effort = EFFORTS[self.options.effort]
        # The rows that the search will look at, before the weights of all experts are copied side by side.
        step, first, looked_at = -(-sum(len(weight) for weight in weights) // effort.search_rows), 0, []
        for weight in weights:
            looked_at.append(weight[first::step])
            first = (first - len(weight)) % step
        return search_scales(torch.cat(looked_at), inputs, self._group_size(channels), shared, effort)

    def _round(
        self, index: int, group: ScaleGroup, folded: dict[str, Tensor], inputs: InputStatistics
    ) -> dict[str, tuple[AwqWeight, float]]:
        """The group's quantized linears and the share of their groups that was clipped."""
        packed: dict[str, tuple[AwqWeight, float]] = {}
        names: list[str] = []
        num_rows = 0
        for name in (name for name in group.linears if self._converts(index, name)):
            rows = len(folded[f"{name}.weight"])
            if names and num_rows + rows > MAX_ROUNDED_ROWS:
                packed |= self._round_together(index, names, folded, inputs)
                names, num_rows = [], 0
            names.append(name)
            num_rows += rows
        return packed | self._round_together(index, names, folded, inputs) if names else packed

    def _round_together(
        self, index: int, names: list[str], folded: dict[str, Tensor], inputs: InputStatistics
    ) -> dict[str, tuple[AwqWeight, float]]:
        """Linears that share the second moment of their (scaled) inputs."""
        weights = [folded[f"{name}.weight"] for name in names]
        clip = torch.cat(
            [self._clipped_rows(name, weight.shape[0]) for name, weight in zip(names, weights, strict=True)]
        )
        choose = RangeChooser(clip, effort=EFFORTS[self.options.effort])
        size = self._group_size(weights[0].shape[1])
        moment, damping = inputs.second_moment, damping_for(inputs.num_tokens)
        if self.options.rounding == "nearest":
            rounded = round_nearest(torch.cat(weights), moment, size, choose)
        else:
            rounded = round_feedback(torch.cat(weights), moment, size, choose, damping)
            if sweeps := EFFORTS[self.options.effort].sweeps:
                rounded = refine(torch.cat(weights), moment, rounded, sweeps, damping)
        shares = choose.num_clipped.double() / rounded.scales.shape[1]
        packed, start = {}, 0
        for name, weight in zip(names, weights, strict=True):
            rows = slice(start, start + weight.shape[0])
            part = Rounded(rounded.integers[rows], rounded.zeros[rows], rounded.scales[rows])
            packed[name] = (
                pack(f"{self.architecture.layer_prefix(index)}{name}", part, size),
                float(shares[rows].mean()),
            )
            start = rows.stop
        return packed

    def _clipped_rows(self, linear: str, num_rows: int) -> Tensor:
        """bool [num_rows]: which rows' ranges may shrink."""
        rows = torch.full((num_rows,), self.options.clip, device=self.device)
        unclipped = self.architecture.unclipped.get(linear)
        if unclipped is not None:
            rows[unclipped.of(self.source.config, num_rows)] = False
        return rows

    def _group_size(self, channels: int) -> int:
        return channels if self.options.group_size == -1 else self.options.group_size

    def _converts(self, index: int, linear: str) -> bool:
        return self.quant_config.converts(f"{self.architecture.layer_prefix(index)}{linear}")

    def _scales(self, index: int, group: ScaleGroup) -> bool:
        """Whether scales are wanted for this group's inputs, which all of its linears share."""
        names = [f"{self.architecture.layer_prefix(index)}{linear}" for linear in group.linears]
        unscaled = any(skipped in name for skipped in self.options.unscaled_modules for name in names)
        return self.options.scales and not unscaled

    def _as_stored(self, index: int, name: str, tensor: Tensor, rounded: Collection[str]) -> Tensor:
        if name.removesuffix(".weight") in rounded:
            return tensor
        return cast_checked(f"{self.architecture.layer_prefix(index)}{name}", tensor, self.dtype)

    def _linear_report(
        self,
        name: str,
        weight: Tensor,
        effective: Tensor,
        scales: Tensor,
        inputs: InputStatistics,
        clipped: float,
    ) -> LinearReport:
        """weight: the original; effective: what stands for it on the scaled inputs, whose statistics `inputs` are."""
        moment = inputs.second_moment
        nearest = nearest_values(weight, self._group_size(weight.shape[1])).sub_(weight).mul_(scales)
        error_nearest = output_error(nearest, moment)
        del nearest
        scaled = weight * scales
        energy = max(output_error(scaled, moment), 1e-30)
        return LinearReport(
            name, error_nearest / energy, output_error(effective.sub_(scaled), moment) / energy, clipped
        )


def pack(name: str, rounded: Rounded, group_size: int) -> AwqWeight:
    """The three tensors of the gemm layout. FormatError if they are not what the format says."""
    if not torch.isfinite(rounded.scales).all():
        raise QuantizeError(f"{name}: weights are too large for fp16 scales (above {65504 * 15 / 2:.0f})")
    qweight, qzeros = pack_int4(rounded.integers.t()), pack_int4(rounded.zeros.t())
    weight = AwqWeight(name, qweight, qzeros, rounded.scales.t().contiguous(), group_size)
    weight.validate()
    return weight


def cast_checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; QuantizeError where a value overflows it."""
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        largest = float(tensor.abs().max())
        raise QuantizeError(
            f"{name}: {largest:g} does not fit {str(dtype).removeprefix('torch.')} "
            f"(at most {torch.finfo(dtype).max:g}); use --dtype bfloat16"
        )
    return cast


def _scale_report(group: ScaleGroup, choice: ScaleChoice) -> ScaleReport:
    relative = 1 / max(choice.energy, 1e-30)
    return ScaleReport(
        group.previous,
        group.linears,
        choice.formula,
        choice.exponent,
        choice.error_identity * relative,
        choice.error * relative,
    )
