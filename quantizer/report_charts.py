"""The report's charts, as SVG that stands by itself: no scripts, nothing fetched. A point's title is its layer and value."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from pygal import Line
from pygal.style import Style

Series = Mapping[str, Sequence[float | None]]
"""Values by label, one per layer; None where a layer has none."""

_ERRORS = (("error_nearest", "nearest rounding"), ("error", "as written"))
_COLOURS = ("#c60", "#06c", "#393", "#a3a", "#777", "#b22", "#0aa")


def error_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Mean relative error of a layer's linears, by nearest rounding and as written."""
    means = {label: [layer[key] for layer in layers] for key, label in _ERRORS}
    return _line("errors", "all linears of a layer", means, wide=True)


def linear_charts(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart per kind of linear: its errors, layer by layer. Experts' are their mean."""
    by_key = {label: _by_kind(layers, "linears", "name", key) for key, label in _ERRORS}
    kinds = next(iter(by_key.values()))
    return [_line(kind, kind, {label: values[kind] for label, values in by_key.items()}) for kind in kinds]


def choice_charts(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The exponents that the search for scales chose, and the share of groups whose range was clipped."""
    exponents = _by_kind(layers, "scales", "previous", "exponent")
    clipped = _by_kind(layers, "linears", "name", "clipped")
    return [
        _line("exponents", "exponents of the scales folded into", exponents, wide=True),
        _line("clips", "clipped groups, share", clipped, wide=True),
    ]


def _by_kind(layers: Sequence[Mapping[str, Any]], table: str, name: str, value: str) -> dict[str, list[float | None]]:
    """Means of `value` over the rows of a layer's table that differ in an expert's number alone."""
    found: dict[str, list[float | None]] = {}
    for index, layer in enumerate(layers):
        values = defaultdict(list)
        for row in layer[table]:
            values[re.sub(r"\.\d+\.", ".*.", row[name])].append(row[value])
        for kind, of_kind in values.items():
            found.setdefault(kind, [None] * len(layers))[index] = sum(of_kind) / len(of_kind)
    return found


def _line(identity: str, title: str, series: Series, wide: bool = False) -> str:
    width = 1200 if wide else 400
    num_layers = max((len(values) for values in series.values()), default=0)
    chart = Line(
        title=title,
        width=width,
        height=300,
        js=[],
        dots_size=2,
        include_x_axis=True,
        legend_at_bottom=True,
        legend_at_bottom_columns=4 if wide else 2,
        x_labels=[str(index) for index in range(num_layers)],
        x_labels_major_every=5,
        show_minor_x_labels=False,
        truncate_label=-1,
        no_data_text="nothing",
        style=Style(
            background="transparent",
            plot_background="transparent",
            colors=_COLOURS,
            guide_stroke_color="#ccc",
            major_guide_stroke_color="#ccc",
            font_family="system-ui, sans-serif",
            title_font_size=14,
            legend_font_size=12,
            no_data_font_size=14,
        ),
    )
    chart.uuid = re.sub(r"\W", "-", identity)  # else it is drawn by lot, and the page differs from call to call
    chart.add_xml_filter(_without_scripts)
    for label, values in series.items():
        chart.add(label, list(_points(values)))
    svg: str = chart.render(is_unicode=True, disable_xml_declaration=True)
    return svg


def _points(values: Iterable[float | None]) -> Iterable[dict[str, Any] | None]:
    for layer, value in enumerate(values):
        yield None if value is None else {"value": value, "tooltip": f"layer {layer}: {value!r}"}


def _without_scripts(svg: Element) -> Element:
    """Nor comments, which name the day: pygal's own configuration is a script, though nothing would run it."""
    for parent in svg.iter():
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag.endswith("script"):
                parent.remove(child)
    return svg
