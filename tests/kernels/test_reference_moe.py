"""The reference's mixture of experts against the formula, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.backend import BackendOptions
from kernels.format import AwqWeight, DenseWeight
from kernels.reference import DenseInput, ReferenceBackend
from tests.kernels.mixtures import MIXTURES, Mixture, make_inputs


def dense(weight: AwqWeight | DenseWeight) -> Tensor:
    return (weight.dequantize() if isinstance(weight, AwqWeight) else weight.weight.float()).double()


def formula(mixture: Mixture, token: Tensor) -> Tensor:
    """fp64, one token [hidden], from the definition."""
    token = token.double()
    logits = (dense(mixture.router()) @ token).tolist()
    routed = logits[: mixture.num_experts]
    total = sum(math.exp(value) for value in routed)
    shares = {index: math.exp(routed[index]) / total for index in sorted(range(len(routed)), key=lambda i: -routed[i])}
    active = dict(list(shares.items())[: mixture.num_active])
    if mixture.renormalize:
        active = {index: share / sum(active.values()) for index, share in active.items()}
    if mixture.shared_width:
        active[mixture.num_experts] = 1 / (1 + math.exp(-logits[-1]))
    output = torch.zeros(mixture.hidden, dtype=torch.float64)
    experts = mixture.experts()
    for index, share in active.items():
        gate, up = (dense(weight) @ token for weight in experts[index].gate_up)
        output += share * (dense(experts[index].down) @ (gate * torch.sigmoid(gate) * up))
    return output


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_what_its_definition_says(name: str) -> None:
    mixture, backend = MIXTURES[name], ReferenceBackend(BackendOptions())
    x = make_inputs(6, mixture.hidden)
    got = backend.moe(DenseInput(x), mixture.prepare(backend), "silu")
    expected = torch.stack([formula(mixture, token) for token in x])
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_does_not_depend_on_the_batch(name: str) -> None:
    mixture, backend = MIXTURES[name], ReferenceBackend(BackendOptions())
    experts, x = mixture.prepare(backend), make_inputs(70, mixture.hidden)
    whole = backend.moe(DenseInput(x), experts, "silu")
    for begin, end in ((0, 1), (3, 5), (7, 30), (5, 70)):
        assert torch.equal(backend.moe(DenseInput(x[begin:end]), experts, "silu"), whole[begin:end])


def test_of_equal_logits_the_lower_index_comes_first() -> None:
    mixture = Mixture(num_experts=4, num_active=2)
    backend = ReferenceBackend(BackendOptions())
    equal = DenseWeight("router", torch.zeros(4, mixture.hidden))
    experts, first = mixture.experts(), DenseWeight("router", torch.zeros(2, mixture.hidden))
    x = DenseInput(make_inputs(3, mixture.hidden))
    got = backend.moe(x, backend.prepare_experts(equal, experts, mixture.routing), "silu")
    expected = backend.moe(x, backend.prepare_experts(first, experts[:2], mixture.routing), "silu")
    assert torch.equal(got, expected)
