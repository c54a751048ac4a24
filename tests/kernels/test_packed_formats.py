"""GPTQ's and compressed-tensors' layouts hold what AWQ's holds, and what they cannot mean here is refused by name."""

from __future__ import annotations

import pytest
import torch

from kernels.format import AwqWeight, FormatError, pack_int4
from kernels.packed_formats import (
    from_compressed_tensors,
    from_gptq,
    pack_sequential,
    to_compressed_tensors,
    unpack_sequential,
)
from tests.packed_checkpoints import compressed_tensors, gptq_tensors, pack_rows, set_symmetric


def make_weight(outputs: int = 24, inputs: int = 96, group_size: int = 32) -> AwqWeight:
    generator = torch.Generator().manual_seed(outputs)
    integers = torch.randint(0, 16, (inputs, outputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (inputs // group_size, outputs), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(zeros.shape, generator=generator) + 0.1).half()
    return AwqWeight("layer", pack_int4(integers), pack_int4(zeros), scales, group_size)


def assert_same(found: AwqWeight, expected: AwqWeight) -> None:
    assert torch.equal(found.qweight, expected.qweight) and torch.equal(found.qzeros, expected.qzeros)
    assert torch.equal(found.scales, expected.scales) and found.group_size == expected.group_size


@pytest.mark.parametrize("columns", [8, 13, 64])
def test_words_hold_values_in_their_order(columns: int) -> None:
    values = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    words = pack_sequential(values)
    assert torch.equal(words, pack_rows(values)) and torch.equal(unpack_sequential(words, columns), values)


@pytest.mark.parametrize("group_size", [16, 32, 96])
@pytest.mark.parametrize("zero_less", [0, 1])
def test_gptq_means_the_same(group_size: int, zero_less: int) -> None:
    weight = make_weight(group_size=group_size)
    tensors = gptq_tensors(weight, zero_less)
    assert_same(from_gptq("layer", tensors, group_size, bool(zero_less)), weight)
    del tensors["g_idx"]
    assert_same(from_gptq("layer", tensors, -1 if group_size == 96 else group_size, bool(zero_less)), weight)


@pytest.mark.parametrize("group_size", [16, 32, 96])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_mean_the_same(group_size: int, symmetric: bool) -> None:
    weight = make_weight(group_size=group_size)
    if symmetric:
        weight = set_symmetric(weight)
    found = from_compressed_tensors(
        "layer", compressed_tensors(weight, symmetric), -1 if group_size == 96 else group_size
    )
    assert_same(found, weight)


def test_what_is_written_is_what_is_read() -> None:
    weight = make_weight()
    tensors = to_compressed_tensors(weight)
    expected = compressed_tensors(weight, symmetric=False)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert_same(from_compressed_tensors("layer", tensors, 32), weight)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_formats_own_library_reads_the_same_weight(symmetric: bool) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weight = set_symmetric(make_weight()) if symmetric else make_weight()
    tensors = compressed_tensors(weight, True) if symmetric else to_compressed_tensors(weight)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"],
        weights=quantization.QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32),
    )
    dense = compressors.PackedQuantizationCompressor.decompress(dict(tensors), scheme)["weight"]
    # The library multiplies in the scale's dtype.
    assert torch.allclose(dense.float(), weight.dequantize(), rtol=2e-3, atol=0)


def test_activation_order_is_refused_by_name() -> None:
    weight = make_weight()
    for key, convert in (
        ("g_idx", lambda tensors: from_gptq("layer", tensors, 32, True)),
        ("weight_g_idx", lambda tensors: from_compressed_tensors("layer", tensors, 32)),
    ):
        tensors = {**gptq_tensors(weight, 1), **compressed_tensors(weight, False)}
        tensors[key] = torch.arange(96).flip(0) // 32
        with pytest.raises(FormatError, match=rf"layer\.{key}: groups are not 32 consecutive inputs.*activation order"):
            convert(tensors)


def test_missing_and_contradicting_tensors_are_named() -> None:
    tensors = compressed_tensors(make_weight(), False)
    with pytest.raises(FormatError, match=r"missing tensor layer\.weight_shape"):
        from_compressed_tensors("layer", {key: tensors[key] for key in tensors if key != "weight_shape"}, 32)
    with pytest.raises(
        FormatError, match=r"layer\.weight_packed: expected shape \[24, 8\] by weight_shape, found \[24, 12\]"
    ):
        from_compressed_tensors("layer", {**tensors, "weight_shape": torch.tensor([24, 64])}, 32)
    with pytest.raises(FormatError, match=r"missing tensor layer\.qzeros"):
        from_gptq("layer", {"qweight": torch.zeros(12, 24).int(), "scales": torch.ones(3, 24).half()}, 32, True)
