"""The native mixture of experts: parity with the reference, and its laws: a token's bits do not depend on the batch, on its place
in it or on threads; what is not finite shows in its token alone; refusals name what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendOptions, PreparedExperts
from kernels.format import DenseWeight
from kernels.reference import DenseInput, ReferenceBackend
from tests.kernels.mixtures import MIXTURES, Mixture, make_inputs

_native = pytest.importorskip("kernels.cpu._native", reason="the native CPU kernels are not built")

from kernels.cpu.backend import CpuBackend  # noqa: E402
from kernels.cpu.linear import CpuLinearInput  # noqa: E402

REFERENCE = ReferenceBackend(BackendOptions())
MIXED = {
    "dense": Mixture(group_sizes=(None, None, None)),
    "dense gate": Mixture(group_sizes=(None, 32, 32), shared_width=32),
    "dense down, odd group": Mixture(hidden=144, group_sizes=(48, 48, None)),
}


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.current_isa()
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa(before)


def cpu(num_threads: int = 2, activations: str = "int8") -> CpuBackend:
    return CpuBackend(BackendOptions(num_threads=num_threads, cpu_activations=activations))


def run(backend: CpuBackend, experts: PreparedExperts, x: Tensor, activation: str = "silu") -> Tensor:
    return backend.moe(CpuLinearInput(x.shape[0], x.contiguous(), ()), experts, activation)  # type: ignore[arg-type]


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("name", [*MIXTURES, *MIXED])
def test_equals_the_reference(isa: str, name: str, activations: str) -> None:
    mixture = {**MIXTURES, **MIXED}[name]
    backend, x = cpu(activations=activations), make_inputs(37, mixture.hidden)
    activation = "gelu_tanh" if name == "dense" else "silu"
    expected = REFERENCE.moe(DenseInput(x), mixture.prepare(REFERENCE), activation)  # type: ignore[arg-type]
    got = run(backend, mixture.prepare(backend), x, activation)
    # int8 activations cost each product about 0.4%; int16 a 250th of that.
    bound = 2e-2 if activations == "int8" else 2e-4
    assert (got - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_does_not_depend_on_the_batch_nor_on_threads(isa: str, name: str, activations: str) -> None:
    """More tokens than are computed at a time, too."""
    mixture = MIXTURES[name]
    num_tokens = 530 if isa == "avx2" and activations == "int8" else 70
    one, two = cpu(1, activations), cpu(2, activations)
    experts, x = mixture.prepare(two), make_inputs(num_tokens, mixture.hidden)
    whole = run(two, experts, x)
    assert torch.isfinite(whole).all() and whole.abs().max() > 0
    assert torch.equal(run(one, experts, x), whole)
    for begin, end in ((0, 1), (69, 70), (3, 6), (5, 14), (1, 70), (num_tokens - 1, num_tokens)):
        assert torch.equal(run(two, experts, x[begin:end]), whole[begin:end])
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(two, experts, x[order]), whole[order])


def test_only_experts_that_a_token_goes_to_are_read() -> None:
    """A batch reads the union of its tokens' experts, each once."""
    mixture, backend = MIXTURES["many"], cpu()
    experts, rows = mixture.prepare(backend), 5
    x = make_inputs(rows, mixture.hidden)
    program = _native.Program(backend._pool)
    backend._program = lambda batch, *kept: program  # type: ignore[method-assign]
    run(backend, experts, x)
    logits = x @ mixture.router().weight.float().t()
    chosen = logits[:, :-1].topk(mixture.num_active).indices
    assert program.num_experts_read == chosen.unique().numel() + 1  # the shared one
    assert rows * mixture.num_active > chosen.unique().numel() > mixture.num_active


def test_what_is_not_finite_shows_in_its_token_alone(isa: str) -> None:
    mixture, backend = MIXTURES["shared"], cpu()
    experts, x = mixture.prepare(backend), make_inputs(40, mixture.hidden)
    expected = run(backend, experts, x)
    x[3, 5], x[20, 1] = float("nan"), float("inf")
    got = run(backend, experts, x)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 20]] = True
    assert torch.isnan(got[bad]).all()
    assert torch.equal(got[~bad], expected[~bad])


def test_of_equal_logits_the_lower_index_comes_first() -> None:
    mixture, backend = Mixture(num_experts=4, num_active=2), cpu()
    experts, x = mixture.experts(), make_inputs(3, mixture.hidden)
    equal, first = (DenseWeight("router", torch.zeros(count, mixture.hidden)) for count in (4, 2))
    got = run(backend, backend.prepare_experts(equal, experts, mixture.routing), x)
    assert torch.equal(got, run(backend, backend.prepare_experts(first, experts[:2], mixture.routing), x))


def test_extreme_logits_give_whole_weights(isa: str) -> None:
    """A router so sure that an exponential would overflow: one expert gets all, the shared one nothing."""
    mixture, backend = Mixture(num_experts=2, num_active=1, renormalize=False, shared_width=32), cpu()
    router = DenseWeight("router", torch.zeros(3, mixture.hidden))
    router.weight[:, 0] = torch.tensor([-4000.0, 4000.0, -4000.0])
    x = make_inputs(2, mixture.hidden)
    x[:, 0] = 1.0
    got = run(backend, backend.prepare_experts(router, mixture.experts(), mixture.routing), x)
    prepared = backend.prepare_experts(router, mixture.experts(), mixture.routing)
    gate_up, down = prepared.experts[1]
    rows = CpuLinearInput(2, x, ())
    expected = backend.linear(backend.gated_linear(rows, gate_up, "silu", for_linear=down), down)
    assert torch.equal(got, expected)


def test_refusals_name_what_is_wrong() -> None:
    mixture, backend = Mixture(num_experts=2, num_active=2), cpu()
    experts, rows = mixture.experts(), make_inputs(3, mixture.hidden)
    with pytest.raises(ValueError, match=r"num_active: expected 1\.\.1 experts, found 2"):
        run(backend, backend.prepare_experts(mixture.router(), experts[:1], mixture.routing), rows)
    with pytest.raises(ValueError, match="router: expected 3 outputs, found 2"):
        run(backend, backend.prepare_experts(mixture.router(), [*experts, experts[0]], mixture.routing), rows)
    other = Mixture(num_experts=1, width=32).experts()
    mismatched = [experts[0], type(experts[0])(experts[1].gate_up, other[0].down)]
    with pytest.raises(ValueError, match=r"down: expected \[128, 64\], found \[128, 32\]"):
        run(backend, backend.prepare_experts(mixture.router(), mismatched, mixture.routing), rows)
    with pytest.raises(TypeError, match="expected experts prepared by the cpu back end"):
        run(backend, mixture.prepare(REFERENCE), rows)
