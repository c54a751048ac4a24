"""Calibration: one decoder layer at a time run over the text, and what is kept of its linears' inputs."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from quantizer.device import CPU
from quantizer.mappings import Architecture, ScaleGroup, attention_implementation
from quantizer.mixtures import down_input, loaded_tensors

BATCH_TOKENS = 4096
"""Tokens run through a layer at once: enough to keep the matmuls busy, little enough to bound memory."""

MOMENT_BLOCK = 512
"""Rows of a second moment that are computed at once: of all blocks but what lies above the diagonal."""


_NO_CACHE = {
    name: None for name in ("cache", "past_key_values") if name in inspect.signature(create_causal_mask).parameters
}
"""The mask functions want a cache named: `past_key_values` once, `cache` in transformers of today, from 5.40 on that alone."""


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What is kept of a linear's inputs x (K channels): E[x xT] and E[|x|], in fp32, over `num_tokens` tokens."""

    second_moment: Tensor
    mean_abs: Tensor
    num_tokens: int

    def scaled(self, scales: Tensor) -> InputStatistics:
        """The statistics of x / scales, in place of these: of a wide linear the second moment is too large to have twice."""
        moment = self.second_moment.div_(scales).div_(scales[:, None])
        return InputStatistics(moment, self.mean_abs / scales, self.num_tokens)


class _Captured(Exception):
    """Ends a forward pass once the last input wanted from it has been seen."""


class _Collector:
    """A forward pre-hook that sums x xT and |x| of one module's inputs, and adds the inputs to `kept`, in host memory."""

    def __init__(self, last: bool = False, kept: list[Tensor] | None = None) -> None:
        self.last, self.kept = last, kept
        self.num_tokens = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.add(arguments[0].flatten(0, -2))
        if self.last:
            raise _Captured

    def add(self, rows: Tensor) -> None:
        """rows: [tokens, K]."""
        if self.num_tokens == 0:
            self.moment = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.absolute = rows.new_zeros(rows.shape[1])
        for block in _blocks(rows.shape[1]):  # its lower half: it is symmetric
            self.moment[block, : block.stop].addmm_(rows[:, block].t(), rows[:, : block.stop])
        self.absolute += rows.abs().sum(0)
        self.num_tokens += rows.shape[0]
        if self.kept is not None:
            self.kept.append(rows.cpu())

    def result(self) -> InputStatistics:
        """Once, at the end: the sums become the means, in place."""
        for block in _blocks(len(self.moment)):
            self.moment[: block.start, block] = self.moment[block, : block.start].t()
        return InputStatistics(self.moment.div_(self.num_tokens), self.absolute.div_(self.num_tokens), self.num_tokens)


def _blocks(channels: int) -> Iterator[slice]:
    """Two or more runs of up to MOMENT_BLOCK channels."""
    size = -(-channels // max(2, -(-channels // MOMENT_BLOCK)))
    for start in range(0, channels, size):
        yield slice(start, min(start + size, channels))


def _batches(hidden: Tensor) -> tuple[Tensor, ...]:
    """Whole sequences, BATCH_TOKENS tokens at a time."""
    return hidden.split(max(1, BATCH_TOKENS // hidden.shape[1]))


class LayerRunner:
    """Runs hidden states through single decoder layers built from the config, in fp32.

    Only the layer it is given is in memory; the model as a whole never exists. The layer and its statistics are on `device`;
    hidden states are in host memory, of which BATCH_TOKENS tokens at a time go to the device.
    """

    def __init__(self, config: PretrainedConfig, architecture: Architecture, device: torch.device = CPU) -> None:
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = attention_implementation(config)
        self.config._experts_implementation = "eager"  # the experts of each token, in one order
        self.architecture = architecture
        self._rotary = architecture.rotary_type(self.config).to(device)
        self._device = device

    def build(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A layer with these tensors (names relative to the layer), which lie on the device: shared, not copied, but for experts,
        which are stacked."""
        with torch.device("meta"):
            layer = self.architecture.layer_type(self.config, index)
        layer.load_state_dict(loaded_tensors(self.architecture, tensors), assign=True, strict=True)
        return layer.eval().requires_grad_(False)

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """hidden: fp32 [sequences, length, hidden size]; returns the layer's output, of the same shape. Both in host memory."""
        output = torch.empty_like(hidden)
        for chunk, place in zip(_batches(hidden), _batches(output), strict=True):
            place.copy_(self._forward(layer, index, chunk.to(self._device)))
        return output

    def _forward(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        mask = self._mask(index)(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            position_ids=positions,
            **_NO_CACHE,
        )
        kind = {"layer_type": self.config.layer_types[index]} if self.architecture.rotary_by_layer_type else {}
        output: Tensor = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self._rotary(hidden, position_ids=positions, **kind),
        )
        return output

    @torch.no_grad()
    def capture(
        self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor
    ) -> Iterator[tuple[ScaleGroup, InputStatistics]]:
        """Each scale group of the layer with these tensors, in order, and its input's statistics, from one pass.

        Every expert of a mixture is calibrated on all tokens, whichever the router would send it: one that this text seldom
        reaches would otherwise be rounded for a few tokens. Their statistics are computed one by one, as they are asked for; a GPU
        is given all tokens anew for each, as its memory may not hold them.
        """
        layer, groups = self.build(index, tensors), self.architecture.layer_groups(self.config, index)
        mixture = self.architecture.mixture
        router = mixture.routers[0] if mixture is not None else ""
        readers = [i for i, group in enumerate(groups) if router in group.linears]
        if mixture is None or not readers:
            statistics = self._collect(layer, index, hidden, [group.linears[0] for group in groups])
            for group in groups:
                yield group, statistics.pop(0)
            return
        activation = layer.get_submodule("mlp.experts").act_fn
        assert isinstance(activation, nn.Module)
        seen, kept = groups[: readers[0] + 1], list[Tensor]()
        modules = [*(group.linears[0] for group in seen[:-1]), "mlp"]
        yield from zip(seen, self._collect(layer, index, hidden, modules, kept), strict=True)
        del layer  # its stacked experts
        for group in groups[len(seen) :]:
            collector = _Collector()
            for rows in kept:
                inputs = rows.to(self._device)
                collector.add(down_input(mixture, tensors, group.linears[0], inputs, activation))
            yield group, collector.result()

    def _collect(
        self, layer: nn.Module, index: int, hidden: Tensor, modules: Sequence[str], kept: list[Tensor] | None = None
    ) -> list[InputStatistics]:
        """Of the inputs of `modules`, in the order they are computed. The last one's are added to `kept`."""
        collectors = [_Collector() for _ in modules[:-1]] + [_Collector(last=True, kept=kept)]
        handles = [
            layer.get_submodule(name).register_forward_pre_hook(collector)
            for name, collector in zip(modules, collectors, strict=True)
        ]
        try:
            for chunk in _batches(hidden):
                # The last module's output is nobody's input here, so it is not computed.
                with contextlib.suppress(_Captured):
                    self._forward(layer, index, chunk.to(self._device))
        finally:
            for handle in handles:
                handle.remove()
        return [collector.result() for collector in collectors]

    def _mask(self, index: int) -> Callable[..., Tensor | None]:
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds[index] == "sliding_attention" if kinds else getattr(self.config, "sliding_window", None)
        return create_sliding_window_causal_mask if sliding else create_causal_mask
