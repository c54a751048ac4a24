from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantizer.calibrate import (
    InputStatistics,
    LayerRunner,
)
from quantizer.mappings import ScaleGroup, find_architecture
from quantizer.sources import open_source
from tests.tiny_models import MIXTURES, kinds_by_cost, layer_tensors, load_reference


@pytest.mark.parametrize("kind", kinds_by_cost())
def test_layer_by_layer_equals_the_whole_model(kind: str, make_checkpoint: Callable[..., Path]) -> None:
    """Masks, sliding windows and rotary embeddings included; and the statistics are those of the inputs seen."""
    folder = make_checkpoint(kind)
    source, model = open_source(str(folder)), load_reference(folder)
    runner = LayerRunner(source.config, find_architecture(source.config))
    tokens = torch.randint(3, 320, (3, 64), generator=torch.Generator().manual_seed(0))
    seen = []
    last = model.model.layers[-1]
    module = last.mlp if kind in MIXTURES else last.mlp.down_proj
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    handle.remove()
    hidden = states[0]
    for index in range(len(model.model.layers)):
        tensors = layer_tensors(folder, index)
        statistics = dict(runner.capture(index, tensors, hidden))
        hidden = runner.run(runner.build(index, tensors), index, hidden)
        if index + 1 < len(model.model.layers):
            assert torch.allclose(hidden, states[index + 1], rtol=1e-4, atol=1e-4)
    inputs = seen[0].reshape(-1, seen[0].shape[-1])
    group = list(statistics)[2 if kind in MIXTURES else -1]
    check_statistics(statistics[group], inputs)
    if kind in MIXTURES:
        check_experts(kind, tensors, statistics, inputs)


def check_statistics(statistics: InputStatistics, inputs: torch.Tensor) -> None:
    expected = inputs.t() @ inputs / len(inputs)
    assert (statistics.second_moment - expected).norm() < 1e-4 * expected.norm()
    assert torch.allclose(statistics.mean_abs, inputs.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert statistics.num_tokens == len(inputs)


def check_experts(
    kind: str, tensors: dict[str, torch.Tensor], statistics: dict[ScaleGroup, InputStatistics], inputs: torch.Tensor
) -> None:
    """Every expert saw every token, whatever its router says; the shared one too."""
    groups = list(statistics)[3:]
    gate = "w1" if kind == "mixtral" else "gate_proj"
    assert len(groups) == {"mixtral": 4, "qwen2_moe": 5 + 1, "qwen3_moe": 8}[kind]
    for group in groups:
        expert, _, up = group.previous.rpartition(".")
        gates, ups = (inputs @ tensors[f"{expert}.{name}.weight"].t() for name in (gate, up))
        check_statistics(statistics[group], torch.nn.functional.silu(gates) * ups)
