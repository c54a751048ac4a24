"""Mixtures of experts on the GPU back end, in the interpreter, against the reference: the two kernels around the grouped products,
the op, and tiny models through the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendOptions, Routing
from kernels.gpu import moe
from kernels.gpu.backend import GpuBackend
from kernels.gpu.tensors import GpuInput
from kernels.reference import DenseInput, ReferenceBackend
from kernels.reference import route as reference_route
from tests.awq_checkpoints import make_awq_checkpoint
from tests.gpu.devices import HostDevice
from tests.gpu.test_engine import LOGIT_ERROR, Served, gpu_backend, random_tokens
from tests.kernels.mixtures import MIXTURES, Mixture, make_inputs
from tests.tiny_models import MIXTURES as KINDS
from tests.tiny_models import make_tiny_model

REFERENCE = ReferenceBackend(BackendOptions())


def run_route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    chosen = torch.empty(len(logits), routing.num_active, dtype=torch.int32)
    weights = torch.empty(len(logits), routing.num_active + routing.shared)
    moe.route(logits, chosen, weights, routing.renormalize)
    return chosen, weights


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "num_active", "shared"), [(8, 2, False), (5, 3, True), (60, 4, True), (3, 1, False)]
)
def test_routes_as_the_reference(num_experts: int, num_active: int, shared: bool, renormalize: bool) -> None:
    logits = torch.randn(9, num_experts + shared, generator=torch.Generator().manual_seed(0)) * 4
    logits[0] = 0.0  # of equal logits the lower index comes first
    logits[1, 0] = 3000.0
    routing = Routing(num_active, renormalize, shared)
    chosen, weights = run_route(logits, routing)
    expected, shares = reference_route(logits, routing)
    assert torch.equal(chosen.long(), expected[:, :num_active])
    torch.testing.assert_close(weights, shares, rtol=1e-5, atol=1e-7)


def test_garbage_goes_to_experts_that_there_are() -> None:
    logits = torch.full((3, 4), float("nan"))
    logits[1], logits[2, 1] = float("inf"), float("-inf")
    chosen, _ = run_route(logits, Routing(3, True))
    assert all(len(set(row)) == 3 and set(row) <= set(range(4)) for row in chosen.tolist())


def test_sums_what_experts_give() -> None:
    rows, shared, weights = torch.randn(6, 1100).half(), torch.randn(3, 1100).half(), torch.rand(3, 3)
    for extra in (None, shared):
        out = torch.empty(3, 1100, dtype=torch.float16)
        moe.combine(rows, extra, weights if extra is not None else weights[:, :2].contiguous(), out)
        expected = (rows.view(3, 2, 1100).float() * weights[:, :2, None]).sum(1)
        if extra is not None:
            expected += extra.float() * weights[:, 2:]
        torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "mixture",
    [
        MIXTURES["shared"],
        Mixture(width=128, num_experts=4),
        Mixture(num_experts=3, num_active=2, group_sizes=(32, None, 32)),
        pytest.param(MIXTURES["many"], marks=pytest.mark.slow),
        pytest.param(Mixture(num_experts=4, group_sizes=(None, None, None)), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_mixture_equals_the_references(mixture: Mixture, dtype: str) -> None:
    backend = GpuBackend(BackendOptions(dtype=dtype), HostDevice())
    x = make_inputs(7, mixture.hidden).to(backend.dtype)
    experts, reference = mixture.prepare(backend), mixture.prepare(REFERENCE)
    # The weights' own bytes: no group of these is padded, but tiles are.
    assert len(experts.expert_nbytes) == len(mixture.widths) and experts.nbytes > sum(experts.expert_nbytes)
    for activation in ("silu", "gelu_tanh"):
        got = backend.moe(GpuInput(x), experts, activation)  # type: ignore[arg-type]
        expected = REFERENCE.moe(DenseInput(x.float()), reference, activation)  # type: ignore[arg-type]
        error = (got.float() - expected).norm() / expected.norm()
        assert error < (2e-3 if dtype == "float16" else 2e-2), error
    assert backend.moe(GpuInput(x[:0]), experts, "silu").shape == (0, mixture.hidden)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_batch_invariant_logits_equal_the_references(kind: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "source", kind, num_hidden_layers=2)
    make_awq_checkpoint(tmp_path / "source", tmp_path / "awq", tmp_path / "dense", 32)
    tokens = random_tokens(24)
    expected = Served(tmp_path / "awq", ReferenceBackend(BackendOptions())).logits(tokens, [24])
    got = Served(tmp_path / "awq", gpu_backend(batch_invariant=True)).logits(tokens, [20, 1, 3])
    # A rounded router may choose another expert where two are as good: of most tokens the logits must be the same.
    errors = (got - expected).abs().amax(-1) / expected.abs().max()
    assert 0 < errors.quantile(0.8) < LOGIT_ERROR["float16"], errors
