import pytest

from quantizer.config import EFFORTS, QuantConfig, QuantizeError, QuantizeOptions


def test_quant_config_round_trips_and_has_the_standard_fields() -> None:
    config = QuantConfig(64)
    assert config.to_dict() == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    skipping = QuantConfig(-1, ("lm_head", "layers.0."))
    assert QuantConfig.from_dict(skipping.to_dict()) == skipping


@pytest.mark.parametrize(
    ("field", "value"),
    [("quant_method", "gptq"), ("bits", 8), ("zero_point", False), ("version", "gemv"), ("group_size", 0)],
)
def test_foreign_quant_config_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(QuantizeError, match=f"{field}.*{value}"):
        QuantConfig.from_dict({**QuantConfig(64).to_dict(), field: value})


def test_foreign_compressed_tensors_are_refused_by_field() -> None:
    """Symmetric ones have no zero points to read."""
    data = QuantConfig(64).to_compressed_tensors(["lm_head"])
    assert QuantConfig.from_compressed_tensors(data) == QuantConfig(64, ("lm_head",))
    data["config_groups"]["group_0"]["weights"]["symmetric"] = True
    with pytest.raises(QuantizeError, match=r"symmetric.*True"):
        QuantConfig.from_compressed_tensors(data)


def test_modules_match_by_substring_and_lm_head_is_always_listed() -> None:
    config = QuantizeOptions(modules_to_not_convert=("down_proj",)).quant_config
    assert config.modules_to_not_convert == ("down_proj", "lm_head")
    assert not config.converts("model.layers.3.mlp.down_proj")
    assert config.converts("model.layers.3.mlp.up_proj")


@pytest.mark.parametrize(
    ("field", "value"),
    [("group_size", 48), ("method", "gptq"), ("rounding", "up"), ("dtype", "float32"), ("samples", 0)],
)
def test_bad_options_name_field_and_value(field: str, value: object) -> None:
    with pytest.raises(QuantizeError, match=f"{field}.*{value}"):
        QuantizeOptions(**{field: value})


def test_rtn_is_nearest_rounding_alone() -> None:
    resolved = QuantizeOptions(method="rtn").resolved()
    assert (resolved.scales, resolved.clip, resolved.rounding) == (False, False, "nearest")
    assert QuantizeOptions(samples=28).resolved() == QuantizeOptions(samples=28)
    assert [QuantizeOptions(effort=name).resolved().samples for name in EFFORTS] == [8, 28, 64]
