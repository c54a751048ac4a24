"""Whole quantizations of tiny models: what is written, that it computes what was judged, and what failure leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from kernels.format import AwqWeight
from quantizer.__main__ import main
from quantizer.config import FORMATS, QuantizeError, QuantizeOptions
from quantizer.evaluate import evaluate, evaluation_rows, load_checkpoint
from quantizer.mappings import ARCHITECTURES
from quantizer.run import quantize
from quantizer.sources import SafetensorsSource
from tests.tiny_models import kinds_by_cost, load_reference

OPTIONS = QuantizeOptions(group_size=32, samples=4, sequence_length=64)


ROUTERS = {
    "mixtral": ["block_sparse_moe.gate"],
    "qwen2_moe": ["mlp.gate", "mlp.shared_expert_gate"],
    "qwen3_moe": ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"],
}
"""Its second layer is dense, with a gate_proj."""


def _run(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    fields = {**OPTIONS.to_dict(), **options}
    return quantize(str(source), out, QuantizeOptions(**fields), progress=False)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("kind", kinds_by_cost())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_architecture_becomes_a_standard_checkpoint(
    kind: str, dtype: torch.dtype, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_checkpoint(kind, dtype), tmp_path / "out"
    report = _run(source, out)
    config = json.loads((out / "config.json").read_text())
    skipped = {"modules_to_not_convert": [*ROUTERS[kind], "lm_head"]} if kind in ROUTERS else {}
    assert config["quantization_config"] == OPTIONS.quant_config.to_dict() | skipped
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.") and len(config["architectures"]) == 1
    tensors, original = _tensors(out), _tensors(source)
    linears = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    model = SafetensorsSource(source).config
    expected = sum(
        not linear.endswith(("mlp.gate", "moe.gate", "expert_gate"))
        for index in range(3)
        for linear in ARCHITECTURES[config["architectures"][0]].layer_linears(model, index)
    )
    assert len(linears) == expected
    for name in linears:
        triple = {key: tensors.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales")}
        assert AwqWeight.from_tensors(name, triple, 32).dequantize().shape == original.pop(f"{name}.weight").shape
        assert triple["scales"].dtype == torch.float16
    assert tensors.keys() == original.keys()
    assert all(tensor.dtype == dtype for tensor in tensors.values())
    assert torch.equal(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert ("lm_head.weight" in tensors) == (not config["tie_word_embeddings"])
    assert (
        AutoTokenizer.from_pretrained(out).get_chat_template()
        == AutoTokenizer.from_pretrained(source).get_chat_template()
    )
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((out / "quantization_report.json").read_text()) == json.loads(json.dumps(report))


@pytest.mark.parametrize("kind", kinds_by_cost())
def test_errors_fall_and_the_report_is_true(kind: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The model on disk, dequantized in transformers, is closer to the original than plain rounding's."""
    source = make_checkpoint(kind, initializer_range=0.08)
    report = _run(source, tmp_path / "awq", samples=32)
    _run(source, tmp_path / "rtn", method="rtn")
    for layer in report["layers"]:
        assert [linear["name"] for linear in layer["linears"]] != []
        total = sum(linear["error"] for linear in layer["linears"])
        assert total < 0.8 * sum(linear["error_nearest"] for linear in layer["linears"])
        for scales in layer["scales"]:
            assert scales["error"] <= scales["error_identity"]
    reference = load_reference(source)
    rows = evaluation_rows(SafetensorsSource(source), "builtin", 64, 2048)
    awq, rtn = (evaluate(load_checkpoint(tmp_path / name), rows, reference) for name in ("awq", "rtn"))
    assert awq.kl_mean is not None and rtn.kl_mean is not None
    assert 0 < awq.kl_mean < rtn.kl_mean


def test_what_did_not_help_is_skipped_and_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Weights that 16 levels hold exactly: neither a scale nor a clipped range can do better."""
    from safetensors.torch import save_file

    source = make_checkpoint("llama")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            levels = torch.randint(-7, 9, tensor.shape, generator=generator)
            levels[:, ::32], levels[:, 1::32] = -7, 8
            tensors[name] = levels / 64.0
    save_file(tensors, source / "model.safetensors")
    report = _run(source, tmp_path / "exact", rounding="nearest")
    for layer in report["layers"]:
        assert "scales of mlp.down_proj" in layer["skipped"] and "clip of mlp.down_proj" in layer["skipped"]
        assert len(layer["skipped"]) == 4 + 5
        assert all(linear["clipped"] == 0 for linear in layer["linears"])
    helped = _run(make_checkpoint("llama", name="other"), tmp_path / "helped")
    shares = {linear["name"]: linear["clipped"] for linear in helped["layers"][0]["linears"]}
    assert 0 < shares["mlp.up_proj"] < 1 and shares["self_attn.q_proj"] == 0
    assert not any(name in layer["skipped"] for layer in helped["layers"] for name in ["clip of mlp.up_proj"])


def test_sharded_output_has_an_index_and_the_same_tensors(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("qwen2", max_shard_size="100KB")
    _run(source, tmp_path / "single")
    _run(source, tmp_path / "sharded", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    single, sharded = _tensors(tmp_path / "single"), _tensors(tmp_path / "sharded")
    assert index["weight_map"].keys() == sharded.keys() == single.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in single.values())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "sharded").iterdir() if path.is_file()}
    assert modes == {(tmp_path / "sharded").stat().st_mode & 0o666}
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(tmp_path / "sharded" / file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_the_same_command_writes_the_same_bytes(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama")
    for name in ("first", "second"):
        _run(source, tmp_path / name)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("group_size", [-1, 32])
def test_compressed_tensors_hold_the_same_model(
    group_size: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint("qwen2", initializer_range=0.08)
    skipped = ("k_proj", "layers.1.mlp")
    for layout in FORMATS:
        _run(source, tmp_path / layout, format=layout, group_size=group_size, modules_to_not_convert=skipped)
    awq, other = (load_checkpoint(tmp_path / layout).state_dict() for layout in FORMATS)
    assert awq.keys() == other.keys() and all(torch.equal(awq[name], other[name]) for name in awq)
    quantization = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    names = _tensors(tmp_path / "compressed-tensors").keys()
    dense = {name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")}
    assert set(quantization["ignore"]) == {"lm_head", *dense} and len(dense) == 3 + 3
    assert not any("qweight" in name for name in names)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_modules_left_out_stay_dense_and_the_model_still_computes(
    group_size: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = make_checkpoint("mistral", initializer_range=0.08), tmp_path / "out"
    skipped = ("k_proj", "down_proj", "layers.1.")
    report = _run(source, out, group_size=group_size, modules_to_not_convert=skipped)
    assert not report["layers"][1]["scales"] and not report["layers"][1]["skipped"], "nothing was tried there"
    assert [scales["previous"] for scales in report["layers"][0]["scales"]] == [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
    ]
    tensors = _tensors(out)
    quantized = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert quantized == {
        f"model.layers.{index}.{name}"
        for index in (0, 2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [*skipped, "lm_head"] and config["group_size"] == group_size
    rows = torch.randint(3, 320, (4, 48), generator=torch.Generator().manual_seed(0))
    quality = evaluate(load_checkpoint(out), rows, load_reference(source))
    assert quality.kl_mean is not None and quality.kl_mean < 0.02


def test_linears_named_unscaled_get_no_scales(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama")
    report = _run(source, tmp_path / "out", unscaled_modules=("o_proj", "layers.1.mlp.down_proj"))
    scaled = [[scales["previous"] for scales in layer["scales"]] for layer in report["layers"]]
    norms = ["input_layernorm", "post_attention_layernorm"]
    assert scaled[0] == scaled[2] == [*norms, "mlp.up_proj"] and scaled[1] == norms


@pytest.mark.parametrize("field", ["modules_to_not_convert", "unscaled_modules"])
def test_a_name_of_no_linear_is_refused(
    field: str, make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(make_checkpoint("llama")), str(tmp_path / "out"), f"--{field.replace('_', '-')}", "o_proj", "w2"]
    assert main(arguments) == 1
    assert f"{field}: 'w2' is part of no linear's name; there are self_attn.q_proj," in capsys.readouterr().err


def test_unscaled_nearest_is_plain_rounding_of_the_source(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from quantizer.rounding import nearest_values

    source, out = make_checkpoint("llama", torch.float16), tmp_path / "out"
    report = _run(source, out, method="rtn")
    original, written = _tensors(source), load_checkpoint(out).state_dict()
    for name, tensor in original.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(written[name], nearest_values(tensor.float(), 32)), name
    assert report["options"]["rounding"] == "nearest" and not report["options"]["clip"]
    assert not any(layer["scales"] or layer["skipped"] for layer in report["layers"])


def test_output_is_never_overwritten_by_accident(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(QuantizeError, match="not empty"):
        _run(source, out)
    with pytest.raises(QuantizeError, match="not a checkpoint"):
        quantize(str(source), out, OPTIONS, overwrite=True, progress=False)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "config.json").write_text("{}")
    quantize(str(source), out, OPTIONS, overwrite=True, progress=False)
    assert not (out / "notes.txt").exists() and (out / "model.safetensors").is_file()


def test_what_was_written_is_read_back(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantizer import export

    def flipped(path: Path, name: str) -> torch.Tensor:
        tensor = load(path, name)
        wrong = path.parent.name != "checkpoint" and name == "model.layers.1.mlp.up_proj.qweight"
        return tensor ^ 1 if wrong else tensor

    load = export.load_tensor
    monkeypatch.setattr(export, "load_tensor", flipped)
    with pytest.raises(QuantizeError, match=r"layers\.1\.mlp\.up_proj\.qweight is not what was written"):
        _run(make_checkpoint("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_group_sizes_that_do_not_divide_are_refused_with_the_way_out(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint("llama")
    status = main([str(source), str(tmp_path / "out"), "--group-size", "64"])
    message = capsys.readouterr().err
    assert status == 1
    assert "model.layers.0.mlp.down_proj: 96 input features" in message and "(32 fits)" in message


def test_a_tokenizer_of_another_model_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", vocab_size=100)
    with pytest.raises(QuantizeError, match=r"the tokenizer gives token \d+, but the model has 100"):
        _run(source, tmp_path / "out")


def test_values_beyond_fp16_are_refused_by_name(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = make_checkpoint("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][5, 5] = 1e5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(QuantizeError, match=r"embed_tokens\.weight: 100000 does not fit float16.*bfloat16"):
        _run(source, tmp_path / "out")
    _run(source, tmp_path / "out", dtype="bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_command_line_quantizes_and_evaluates(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_checkpoint("qwen3"), tmp_path / "out"
    assert main([str(source), str(out), "--group-size", "32", "--samples", "4", "--sequence-length", "64"]) == 0
    assert (
        main(["evaluate", str(out), "--reference", str(source), "--sequence-length", "64", "--max-tokens", "512"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_tokens"] == 8 * 63 and result["kl_mean"] > 0 and 0 < result["top_1_agreement"] <= 1
    assert result["perplexity"] > 1 and result["reference_perplexity"] > 1 and result["bits_per_weight"] > 4
    assert result["bytes"] == (out / "model.safetensors").stat().st_size
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("layout", FORMATS)
def test_a_damaged_checkpoint_is_not_evaluated(
    layout: str, make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "out"
    _run(make_checkpoint("llama"), out, format=layout)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj." + {"awq": "qzeros", "compressed-tensors": "weight_zero_point"}[layout]
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, out / "model.safetensors")
    assert main(["evaluate", str(out), "--sequence-length", "64"]) == 1
    assert "error: model.layers.1.mlp.up_proj" in capsys.readouterr().err
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, out / "model.safetensors")
    assert main(["evaluate", str(out), "--sequence-length", "64"]) == 1
    assert f"missing tensor {name}" in capsys.readouterr().err


def test_a_model_is_no_distance_from_itself(make_checkpoint: Callable[..., Path]) -> None:
    source = make_checkpoint("llama-untied-biased")
    rows = torch.randint(3, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    result = evaluate(load_checkpoint(source), rows, load_checkpoint(source))
    assert result.kl_mean == 0 and result.kl_percentile_99 == 0 and result.top_1_agreement == 1
    assert result.perplexity == result.reference_perplexity
    loss = float(load_reference(source)(rows, labels=rows).loss.detach().exp())
    assert abs(result.perplexity / loss - 1) < 1e-4
