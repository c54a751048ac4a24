"""Writes the table of docs/models.md from the tables that the server and the quantizer work by: `make models-page`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quantizer.mappings import ARCHITECTURES as MAPPINGS
from quantizer.mappings import Architecture as Mapping
from quantizer.mappings import Fold
from server.architectures import ARCHITECTURES, WRAPPERS, Architecture
from server.model_config import ACTIVATIONS, ROPE_TYPES

PAGE = Path(__file__).parent / "models.md"
BEGIN, END = "<!-- written by docs/supported_models.py: -->\n", "<!-- until here -->\n"


def traits(architecture: Architecture) -> str:
    """What sets a decoder apart from Llama's."""
    norms, mixture = architecture.norms, architecture.mixture
    named = {
        "norms after the sublayers": norms.input is None,
        "norms before and after the sublayers": norms.input is not None and norms.attention_output is not None,
        "norms times 1 + w": architecture.unit_offset_norms,
        f"norm of q and k over {architecture.qk_norm}": architecture.qk_norm != "none",
        "biased q, k, v": architecture.qkv_bias is True,
        "fused q, k, v": len(architecture.qkv) == 1,
        "fused gate and up": len(architecture.gate_up) == 1,
        "sliding window": architecture.sliding_window in ("all", "used"),
        "sliding window in some layers": architecture.sliding_window in ("layer_types", "pattern"),
        "a RoPE of their own for those": architecture.local_rope_theta is not None,
        "RoPE of neighbouring channels": architecture.interleaved_rope,
        "RoPE of a part of the head": "partial_rotary_factor" in architecture.defaults,
        "layers without RoPE": architecture.no_rope_layers,
        "scaled embeddings": architecture.sqrt_embedding_scale,
        "scores scaled by config.json": architecture.query_scalar,
        "soft caps": architecture.soft_caps,
        "four multipliers": architecture.multipliers,
        "mixture of experts": mixture is not None,
        "in some layers": mixture is not None and mixture.some_layers,
        "a shared expert": mixture is not None and mixture.shared,
    }
    return "; ".join(name for name, holds in named.items() if holds)


def scales(mapping: Mapping) -> str:
    """Where the scales of the quantized linears fold."""
    short = {name: name.split(".")[-1].removesuffix("_proj") for group in mapping.groups for name in group.linears}

    def inputs(none: bool) -> list[str]:
        groups = [group for group in mapping.groups if (group.fold is Fold.NONE) == none]
        return [", ".join(short[linear] for linear in group.linears) for group in groups]

    unscaled = inputs(True)
    if mapping.mixture is not None:
        attention = [names for names in inputs(False) if "gate" not in names and "down" not in names]
        return "; ".join([*attention, "gate, up of all experts; each expert's down"])
    return "; ".join(inputs(False)) + (f" (not {'; '.join(unscaled)})" if unscaled else "")


def table() -> str:
    mappings = {mapping.model_type: mapping for mapping in MAPPINGS.values()}
    lines = ["| `model_type` | models | beside Llama's decoder | scaled while quantized |", "|---|---|---|---|"]
    for model_type, architecture in ARCHITECTURES.items():
        columns = (f"`{model_type}`", architecture.models, traits(architecture), scales(mappings[model_type]))
        lines.append(f"| {' | '.join(columns)} |")
    for model_type, wrapper in WRAPPERS.items():
        note = f"its `text_config`, as `{wrapper.model_type}`; {wrapper.ignored_as} is passed over"
        lines.append(f"| `{model_type}` | | {note} | as there |")
    lines += ["", f"Activations: {', '.join(f'`{name}`' for name in ACTIVATIONS)}."]
    lines += [f"RoPE types: {', '.join(f'`{name}`' for name in ROPE_TYPES)}.", ""]
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE.name} has lost the marks around its table"
    return before + BEGIN + table() + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    check = parser.parse_args().check
    page = PAGE.read_text()
    if written(page) == page:
        return 0
    if not check:
        PAGE.write_text(written(page))
        return 0
    print(f"{PAGE.name} is not what the tables say: make models-page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
