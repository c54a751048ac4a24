"""The `awq-quantize` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantizer.config import DTYPES, GROUP_SIZES, METHODS, ROUNDINGS, QuantizeError, QuantizeOptions

_DESCRIPTION = """\
Quantize a language model to 4-bit AWQ: awq-quantize SOURCE OUT
Measure what it cost:                   awq-quantize evaluate CHECKPOINT --reference SOURCE

SOURCE is a checkpoint folder with safetensors, a .gguf file, or a Hugging Face repository id (owner/name).
OUT becomes a folder in the standard AWQ "gemm" format, with tokenizer, chat template and generation config carried
over and quantization_report.json beside the weights. It appears only when it is whole and has been read back.
Llama, Mistral, Qwen2 and Qwen3 models are supported.
"""

_EXAMPLES = """\
examples:
  awq-quantize Qwen/Qwen3-0.6B models/qwen3-0.6b-awq
  awq-quantize model.Q8_0.gguf models/model-awq --group-size 64
  awq-quantize ./finetuned models/finetuned-awq --calibration chats.jsonl --samples 128
  awq-quantize ./finetuned models/finetuned-rtn --method rtn      (plain rounding, to compare with)
  awq-quantize evaluate models/finetuned-awq --reference ./finetuned --text held_out.txt
"""


def build_parser() -> argparse.ArgumentParser:
    defaults = QuantizeOptions()
    parser = argparse.ArgumentParser(
        prog="awq-quantize",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, .gguf file or repository id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already at OUT")
    add_source_arguments(parser)

    form = parser.add_argument_group("format")
    form.add_argument(
        "--group-size",
        type=int,
        default=defaults.group_size,
        choices=GROUP_SIZES,
        help="inputs that share a scale; -1 is a whole row. Smaller is better, but larger (default: %(default)s)",
    )
    form.add_argument(
        "--dtype",
        default=defaults.dtype,
        choices=DTYPES,
        help="of embeddings, norms, biases and lm_head. auto keeps float16 and bfloat16 and writes the rest "
        "as float16 (default: %(default)s)",
    )
    form.add_argument(
        "--modules-to-not-convert",
        nargs="+",
        default=[],
        metavar="NAME",
        help="leave linears unquantized whose full name contains NAME, for example down_proj or layers.0.",
    )
    form.add_argument(
        "--max-shard-size",
        type=float,
        default=defaults.max_shard_bytes / 1e9,
        metavar="GB",
        help="size of a safetensors file at which the next one is begun (default: %(default)g)",
    )

    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        default=defaults.method,
        choices=METHODS,
        help="awq searches scales and clips; rtn only rounds to nearest (default: %(default)s)",
    )
    method.add_argument("--no-scales", action="store_true", help="skip the search for per-channel scales")
    method.add_argument("--no-clip", action="store_true", help="skip the search for clipped ranges")
    method.add_argument(
        "--rounding",
        default=defaults.rounding,
        choices=ROUNDINGS,
        help="feedback lets later columns make up for the rounding error of earlier ones (default: %(default)s)",
    )

    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        default=defaults.calibration,
        metavar="TEXT",
        help="'builtin' (English text and code of Python, prose of this package, random tokens), a text file, or a .jsonl "
        "file with a string or an object "
        "with 'text' per line (default: %(default)s)",
    )
    calibration.add_argument("--samples", type=int, default=defaults.samples, help="sequences (default: %(default)s)")
    calibration.add_argument(
        "--sequence-length", type=int, default=defaults.sequence_length, help="tokens of each (default: %(default)s)"
    )
    calibration.add_argument("--seed", type=int, default=defaults.seed, help="for drawing them (default: %(default)s)")
    return parser


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("Hugging Face hub")
    hub.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repository id (default: main)")
    hub.add_argument("--offline", action="store_true", help="use only what is already in the local hub cache")


def options_from_arguments(arguments: argparse.Namespace) -> QuantizeOptions:
    return QuantizeOptions(
        group_size=arguments.group_size,
        method=arguments.method,
        scales=not arguments.no_scales,
        clip=not arguments.no_clip,
        rounding=arguments.rounding,
        calibration=arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        seed=arguments.seed,
        dtype=arguments.dtype,
        modules_to_not_convert=tuple(arguments.modules_to_not_convert),
        max_shard_bytes=int(arguments.max_shard_size * 1e9),
    )


def quantize(
    source_name: str,
    out: Path,
    options: QuantizeOptions,
    *,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantizes SOURCE into OUT and returns the report that was written. QuantizeError for what the user can mend."""
    import torch
    from tqdm import tqdm

    from quantizer import export, pipeline, sources
    from quantizer.calibrate import calibration_tokens
    from quantizer.mappings import find_architecture

    export.check_output(out, overwrite)
    started = time.monotonic()
    source = sources.open_source(source_name, revision, offline)
    architecture = find_architecture(source.config)
    shapes = sources.check_tensors(source)
    num_layers = source.config.num_hidden_layers
    pipeline.check_divisible(architecture, options, shapes, num_layers)
    dtype = source.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.float16
    tokens = calibration_tokens(
        source.tokenizer(),
        source.config.vocab_size,
        options.calibration,
        options.samples,
        options.sequence_length,
        options.seed,
    )
    quantizer = pipeline.LayerQuantizer(source, architecture, options, shapes, dtype)
    layers = []
    with export.CheckpointWriter(out, options.max_shard_bytes, overwrite) as writer:
        with tqdm(total=num_layers, desc="quantizing", unit="layer", disable=not progress) as bar:
            for result in quantizer.layers(tokens):
                for name, tensor in result.tensors.items():
                    writer.add(name, tensor)
                layers.append(result.report)
                bar.set_postfix_str(f"error {result.report.error:.2e} (nearest {result.report.error_nearest:.2e})")
                bar.update()
        for name, shape in shapes.items():
            if not name.startswith(f"{architecture.layers}."):
                writer.add(name, pipeline.cast_checked(name, sources.load_checked(source, name, shape), dtype))
        report = {
            "source": source.description,
            "architecture": architecture.name,
            "options": options.resolved().to_dict(),
            "calibration_tokens": tokens.numel(),
            "versions": pipeline.versions(),
            "seconds": round(time.monotonic() - started, 1),
            "bytes": writer.total_bytes,
            "layers": [asdict(layer) for layer in layers],
        }
        writer.finish(source, options.quant_config, dtype, report)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    # Messages of libraries about optional features would break the progress bar.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when torch is first imported, below. Threads that spin between matmuls take the cores from those that work wherever
    # anything else runs: beside three busy processes the demo model took 477 s instead of 108.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["evaluate"]:
            from quantizer.evaluate import main as evaluate_main

            return evaluate_main(arguments[1:])
        parsed = build_parser().parse_args(arguments)
        report = quantize(
            parsed.source,
            parsed.out,
            options_from_arguments(parsed),
            revision=parsed.revision,
            offline=parsed.offline,
            overwrite=parsed.overwrite,
        )
    except QuantizeError as error:
        print(f"awq-quantize: error: {error}", file=sys.stderr)
        return 1
    megabytes = report["bytes"] / 1e6
    print(f"wrote {parsed.out}: {megabytes:.0f} MB in {report['seconds']:.0f} s; {len(report['layers'])} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
