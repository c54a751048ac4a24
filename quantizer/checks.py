"""What is refused before any work: options that do not fit the model."""

from __future__ import annotations

from transformers import PretrainedConfig

from quantizer.config import QuantizeError, QuantizeOptions
from quantizer.mappings import Architecture


def check_names(architecture: Architecture, options: QuantizeOptions, model: PretrainedConfig) -> None:
    """QuantizeError naming a module asked to be left out or unscaled that is none of this model's linears."""
    linears = [
        f"{architecture.layer_prefix(index)}{linear}"
        for index in range(model.num_hidden_layers)
        for linear in architecture.layer_linears(model, index)
    ]
    linears += [*architecture.routers(model), "lm_head"]
    for option in ("modules_to_not_convert", "unscaled_modules"):
        for wanted in getattr(options, option):
            if not any(wanted in linear for linear in linears):
                first = [name.removeprefix(architecture.layer_prefix(0)) for name in linears][:7]
                raise QuantizeError(
                    f"{option}: {wanted!r} is part of no linear's name; there are {', '.join(first)}, ..."
                )


def check_divisible(
    architecture: Architecture, options: QuantizeOptions, shapes: dict[str, tuple[int, ...]], model: PretrainedConfig
) -> None:
    """QuantizeError naming the first linear that the group size or the word of 8 columns does not divide."""
    config = options.quant_config
    for index in range(model.num_hidden_layers):
        for linear in architecture.layer_linears(model, index):
            name = f"{architecture.layer_prefix(index)}{linear}"
            rows, columns = shapes[f"{name}.weight"]
            if not config.converts(name):
                continue
            way_out = f"or leave it unquantized with --modules-to-not-convert {linear.split('.')[-1]}"
            if rows % 8:
                raise QuantizeError(f"{name}: {rows} output features are not a multiple of 8; {way_out[3:]}")
            if options.group_size != -1 and columns % options.group_size:
                fitting = ", ".join(str(size) for size in (32, 64, 128) if columns % size == 0) or "only -1"
                raise QuantizeError(
                    f"{name}: {columns} input features are not a multiple of group size {options.group_size}; "
                    f"use --group-size ({fitting} fits) {way_out}"
                )
