"""The AWQ layout: bit order, round trips, dequantization, shards, and errors that name what is wrong."""

from __future__ import annotations

import pytest
import torch

from kernels.format import NIBBLE_COLUMNS, AwqWeight, DenseWeight, FormatError, pack_int4, unpack_int4


def random_weight(in_features: int = 64, out_features: int = 48, group_size: int = 32) -> AwqWeight:
    groups = in_features // group_size
    return AwqWeight(
        "layer.proj",
        pack_int4(torch.randint(0, 16, (in_features, out_features))),
        pack_int4(torch.randint(0, 16, (groups, out_features))),
        torch.rand(groups, out_features).half() * 0.1,
        group_size,
    )


def test_bit_order_is_autoawqs() -> None:
    """Written out by hand: nibble i of a word is column [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    columns = torch.arange(8)[None] + 3
    word = int(pack_int4(columns)[0, 0]) & 0xFFFFFFFF
    assert word == sum((column + 3) << (4 * nibble) for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    assert NIBBLE_COLUMNS == (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (33, 256)])
def test_round_trip(shape: tuple[int, int]) -> None:
    values = torch.randint(0, 16, shape, dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(values)), values)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(FormatError, match="12 columns"):
        pack_int4(torch.zeros(2, 12, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"0\.\.16"):
        pack_int4(torch.arange(0, 17).reshape(1, 17)[:, 1:].clamp(max=16) * torch.tensor([0] * 15 + [1]))


def test_dequantize_equals_the_formula_written_plainly() -> None:
    weight = random_weight()
    q, z = weight.unpack()
    dense = weight.dequantize()
    for row, column in ((0, 0), (31, 5), (32, 5), (63, 47)):
        group = row // weight.group_size
        expected = (float(q[row, column]) - float(z[group, column])) * float(weight.scales[group, column])
        assert dense[column, row].item() == pytest.approx(expected, abs=0)


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_the_parts_of_the_whole(dim: int) -> None:
    weight = random_weight(in_features=128, out_features=64)
    parts = [weight.shard(dim, rank, 2) for rank in range(2)]
    for part in parts:
        part.validate()
    assert torch.equal(torch.cat([part.dequantize() for part in parts], dim=dim), weight.dequantize())


@pytest.mark.parametrize(("dim", "world", "size"), [(0, 4, "48 output"), (1, 4, "64 input")])
def test_a_shard_that_cuts_a_word_or_group_is_refused(dim: int, world: int, size: str) -> None:
    with pytest.raises(FormatError, match=rf"layer\.proj: {size} features do not split into {world}"):
        random_weight().shard(dim, 0, world)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("qweight", torch.zeros(64, 6), r"layer\.proj\.qweight: expected dtype int32, found float32"),
        (
            "qzeros",
            torch.zeros(3, 6, dtype=torch.int32),
            r"layer\.proj\.qzeros: expected shape \[2, 6\], found \[3, 6\]",
        ),
        ("scales", torch.zeros(2, 48), r"layer\.proj\.scales: expected dtype float16 or bfloat16, found float32"),
        ("scales", torch.zeros(2, 40).half(), r"layer\.proj\.scales: expected shape \[2, 48\], found \[2, 40\]"),
    ],
)
def test_validation_names_tensor_expected_and_found(tensor: str, value: torch.Tensor, message: str) -> None:
    weight = random_weight()
    tensors = {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales, tensor: value}
    with pytest.raises(FormatError, match=message):
        AwqWeight.from_tensors("layer.proj", tensors, 32)


def test_group_size_minus_one_is_the_whole_input() -> None:
    weight = random_weight(in_features=64, group_size=64)
    tensors = {"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales}
    assert AwqWeight.from_tensors("layer.proj", tensors, -1).group_size == 64
    with pytest.raises(FormatError, match="64 input features are not a multiple of group size 48"):
        AwqWeight.from_tensors("layer.proj", tensors, 48)
    with pytest.raises(FormatError, match=r"missing tensor layer\.proj\.scales"):
        AwqWeight.from_tensors("layer.proj", {"qweight": weight.qweight, "qzeros": weight.qzeros}, 64)


def test_outputs_in_another_order() -> None:
    q, z = torch.randint(0, 16, (32, 24)), torch.randint(0, 16, (2, 24))
    weight = AwqWeight("m", pack_int4(q), pack_int4(z), torch.rand(2, 24).half(), 16)
    order = torch.randperm(24)
    selected = weight.select_outputs(order)
    selected.validate()
    assert torch.equal(selected.dequantize(), weight.dequantize()[order])
    assert torch.equal(DenseWeight("m", weight.dequantize()).select_outputs(order).weight, selected.dequantize())
