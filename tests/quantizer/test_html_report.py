"""The page says what the JSON says, needs nothing else, and its command gives the same options."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantizer.__main__ import build_parser, main, options_from_arguments
from quantizer.config import QuantizeOptions
from quantizer.html_report import command, render
from quantizer.report_charts import linear_charts
from quantizer.run import quantize


def _numbers(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield repr(value)


def test_every_number_is_the_jsons(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"
    quantize(str(source), out, QuantizeOptions(group_size=32, samples=2, sequence_length=64), progress=False)
    arguments = ["evaluate", str(out), "--reference", str(source), "--sequence-length", "64", "--max-tokens", "128"]
    assert main([*arguments, "--report"]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    page = (out / "quantization_report.html").read_text()
    shown = re.findall(r'<span title="([^"]+)">([^<]+)</span>', page)
    known = {*_numbers(report), repr(len(report["layers"]))}
    assert {title for title, _ in shown} <= known
    for title, text in shown:
        assert float(text.replace(",", "")) == pytest.approx(float(title), rel=1e-3)
    shown_values = {title for title, _ in shown}
    for layer in report["layers"]:
        assert set(_numbers(layer["linears"])) | set(_numbers(layer["scales"])) <= shown_values
    assert {repr(report["evaluation"][key]) for key in ("perplexity", "kl_mean", "bits_per_weight")} <= shown_values
    plotted = [float(value) for _, value in re.findall(r"<title>layer (\d+): ([^<]+)</title>", page)]
    means = [layer[key] for key in ("error_nearest", "error") for layer in report["layers"]]
    assert plotted[: len(means)] == means, "the first chart"
    linears = [linear for layer in report["layers"] for linear in layer["linears"]]
    tables = (
        (linears, ("error_nearest", "error", "clipped")),
        ([s for x in report["layers"] for s in x["scales"]], ("exponent",)),
    )
    listed = [row[key] for rows, keys in tables for key in keys for row in rows]
    assert sorted(plotted[len(means) :]) == sorted(listed), "every error, exponent and share, once"
    for layer in report["layers"]:
        errors = [linear["error"] for linear in layer["linears"]]
        assert layer["error"] == pytest.approx(sum(errors) / len(errors))
    assert page == render(report)
    assert not re.search(r"<script|src=|href=|@import|url\(|<!--", page)


def test_experts_are_charted_as_one_kind(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(
        str(make_checkpoint("mixtral")),
        out,
        QuantizeOptions(group_size=32, samples=2, sequence_length=64),
        progress=False,
    )
    layers = json.loads((out / "quantization_report.json").read_text())["layers"]
    (chart,) = (svg for svg in linear_charts(layers) if "block_sparse_moe.experts.*.w2" in svg)
    plotted = [float(value) for value in re.findall(r"<title>layer 1: ([^<]+)</title>", chart)]
    experts = [linear for linear in layers[1]["linears"] if re.fullmatch(r".*experts\.\d+\.w2", linear["name"])]
    assert len(experts) > 1
    assert plotted == pytest.approx(
        [sum(expert[key] for expert in experts) / len(experts) for key in ("error_nearest", "error")]
    )


def test_a_quantization_that_is_to_be_evaluated_has_it_in_its_report(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, out, text = make_checkpoint("llama"), tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Some words that are scored. " * 300)
    arguments = ["--group-size", "32", "--samples", "2", "--sequence-length", "64", "--evaluate", str(text)]
    assert main([str(source), str(out), *arguments[:-1], str(tmp_path / "none.txt")]) == 1
    assert not out.exists(), "a text that is missing is said before the work"
    assert main([str(source), str(out), *arguments]) == 0
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["evaluation"]["text"] == str(text) and report["evaluation"]["kl_mean"] > 0
    assert "<h2>Evaluation</h2>" in (out / "quantization_report.html").read_text()


def test_names_are_escaped(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", name="a<b>&c")
    quantize(
        str(source), tmp_path / "out", QuantizeOptions(group_size=32, samples=2, sequence_length=64), progress=False
    )
    page = (tmp_path / "out" / "quantization_report.html").read_text()
    assert "a&lt;b&gt;&amp;c" in page and "a<b>" not in page


@pytest.mark.parametrize(
    "options",
    [
        QuantizeOptions(),
        QuantizeOptions(group_size=64, effort="fast", format="compressed-tensors", clip=False, seed=3),
        QuantizeOptions(method="rtn", samples=4, dtype="bfloat16", max_shard_bytes=1_500_000_001),
        QuantizeOptions(rounding="nearest", scales=False, modules_to_not_convert=("k_proj", "layers.0.")),
        QuantizeOptions(effort="high", unscaled_modules=("o_proj", "layers.0.mlp.down_proj")),
    ],
)
def test_the_command_repeats_the_options(options: QuantizeOptions) -> None:
    words = shlex.split(command("a folder/model", options.resolved(), "v 1"))
    parsed = build_parser().parse_args(words[1:])
    assert (parsed.source, parsed.revision) == ("a folder/model", "v 1")
    assert options_from_arguments(parsed).resolved() == options.resolved()
