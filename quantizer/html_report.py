"""quantization_report.html: the JSON report for people. One file, no scripts, no references to other files.

Every number carries the JSON's value in full as its title, so that hovering shows it and a test can compare them.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantizer.config import QuantizeOptions
from quantizer.report_charts import choice_charts, error_chart, linear_charts

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20em, 1fr)); }
details { margin: 1em 0; } summary { cursor: pointer; }
"""


def render(report: Mapping[str, Any]) -> str:
    """report: what quantization_report.json holds."""
    layers = report["layers"]
    sections = [
        "<h1>Quantization report</h1>",
        f"<pre>{html.escape(report['command'])}</pre>",
        _table(("", ""), [(label, _cell(value)) for label, value in _summary(report)]),
    ]
    if "evaluation" in report:
        evaluation = report["evaluation"]
        rows = [(key.replace("_", " "), _cell(value)) for key, value in evaluation.items() if value is not None]
        sections += ["<h2>Evaluation</h2>", _table(("", ""), rows)]
    sections += [
        "<h2>Relative output error, layer by layer</h2>",
        "<p>tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), mean over a layer's linears, on the calibration text.</p>",
        error_chart(layers),
        f'<div class="charts">{"".join(linear_charts(layers))}</div>',
        "<h2>What the searches chose</h2>",
        *choice_charts(layers),
        "<details><summary>Every linear</summary>",
        _table(("layer", "linear", "nearest", "written", "clipped groups"), _linear_rows(layers)),
        "</details><details><summary>Every scale</summary>",
        "<p>Errors of nearest rounding without and with the chosen scales, relative, over the rows that were searched.</p>",
        _table(("layer", "folded into", "formula", "exponent", "without", "with"), _scale_rows(layers)),
        "</details>",
        "<h2>Tried and not done, because it did not help</h2>",
        _table(
            ("layer", ""), [(_cell(layer["layer"]), html.escape(name)) for layer in layers for name in layer["skipped"]]
        ),
    ]
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Quantization report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def command(source: str, options: QuantizeOptions, revision: str | None = None) -> str:
    """The command line that gives these options; OUT is left to the reader."""
    words = ["awq-quantize", source, "OUT", *(("--revision", revision) if revision else ())]
    defaults = QuantizeOptions().resolved()
    for field, value in options.to_dict().items():
        flag = f"--{field.replace('_', '-')}"
        if value == getattr(defaults, field):
            continue
        if field in ("scales", "clip"):
            words += [f"--no-{field}"] if options.method == "awq" else []
        elif field == "max_shard_bytes":
            words += ["--max-shard-size", repr(value / 1e9)]
        elif field in ("modules_to_not_convert", "unscaled_modules"):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _summary(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    layers = report["layers"]
    return [
        ("source", report["source"]["name"]),
        ("source SHA-256", report["source"]["sha256"]),
        ("architecture", report["architecture"]),
        ("calibration tokens", report["calibration_tokens"]),
        ("layers", len(layers)),
        ("bytes of tensors", report["bytes"]),
        ("seconds", report["seconds"]),
        ("peak memory, bytes", report["peak_memory_bytes"]),
        *((f"version: {name}", value) for name, value in report["versions"].items()),
    ]


def _linear_rows(layers: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for layer in layers:
        for linear in layer["linears"]:
            values = (linear["error_nearest"], linear["error"], linear["clipped"])
            yield (_cell(layer["layer"]), html.escape(linear["name"]), *map(_cell, values))


def _scale_rows(layers: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for layer in layers:
        for scale in layer["scales"]:
            values = (scale["exponent"], scale["error_identity"], scale["error"])
            yield (_cell(layer["layer"]), html.escape(scale["previous"]), scale["formula"], *map(_cell, values))


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return html.escape(str(value))
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<span title="{value!r}">{shown}</span>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td{' class=number' if cell.startswith('<span') else ''}>{cell}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>" if lines else "<p>Nothing.</p>"
