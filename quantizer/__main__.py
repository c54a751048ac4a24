"""The `awq-quantize` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quantizer.config import DTYPES, EFFORTS, FORMATS, GROUP_SIZES, METHODS, ROUNDINGS, QuantizeError, QuantizeOptions

_DESCRIPTION = """\
Quantize a language model to 4-bit AWQ: awq-quantize SOURCE OUT
Measure what it cost:                   awq-quantize evaluate CHECKPOINT --reference SOURCE

SOURCE is a checkpoint folder with safetensors, a .gguf file, or a Hugging Face repository id (owner/name).
OUT becomes a folder in the standard AWQ "gemm" format (or compressed-tensors), with tokenizer, chat template and
generation config carried over and quantization_report.json beside the weights. It appears only when it is whole and
has been read back.
Stop it at any moment: the same command goes on at the next layer, and writes what it would have written.
docs/models.md lists the architectures; another one is refused by its name.
"""

_EXAMPLES = """\
examples:
  awq-quantize Qwen/Qwen3-0.6B models/qwen3-0.6b-awq
  awq-quantize model.Q8_0.gguf models/model-awq --group-size 64
  awq-quantize ./finetuned models/finetuned-awq --calibration chats.jsonl --samples 128 --evaluate
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
    parser.add_argument(
        "--restart", action="store_true", help="discard what an interrupted run of another command left beside OUT"
    )
    parser.add_argument(
        "--no-memory-check", action="store_true", help="start even if memory or disk will not do by the estimate"
    )
    parser.add_argument(
        "--evaluate",
        nargs="?",
        const="builtin",
        metavar="TEXT",
        help="then score OUT beside SOURCE, on text held out from the builtin or on a file, and put that into the report; both "
        "models are in memory meanwhile, in fp32",
    )
    add_source_arguments(parser)
    _add_format_arguments(parser, defaults)
    _add_method_arguments(parser, defaults)
    _add_calibration_arguments(parser, defaults)
    return parser


def _add_format_arguments(parser: argparse.ArgumentParser, defaults: QuantizeOptions) -> None:
    form = parser.add_argument_group("format")
    form.add_argument(
        "--group-size",
        type=int,
        default=defaults.group_size,
        choices=GROUP_SIZES,
        help="inputs that share a scale; -1 is a whole row. Smaller is better, but larger (default: %(default)s)",
    )
    form.add_argument(
        "--format",
        default=defaults.format,
        choices=FORMATS,
        help="awq is the gemm layout; compressed-tensors is its pack-quantized one, of the same integers (default: %(default)s)",
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


def _add_method_arguments(parser: argparse.ArgumentParser, defaults: QuantizeOptions) -> None:
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method",
        default=defaults.method,
        choices=METHODS,
        help="awq searches scales and clips; rtn only rounds to nearest (default: %(default)s)",
    )
    method.add_argument(
        "--effort",
        default=defaults.effort,
        choices=tuple(EFFORTS),
        help="fast searches more coarsely and on half of the text; high more finely and on more text, and refines integers and "
        "scales after rounding (default: %(default)s)",
    )
    method.add_argument("--no-scales", action="store_true", help="skip the search for per-channel scales")
    method.add_argument(
        "--unscaled-modules",
        nargs="+",
        default=[],
        metavar="NAME",
        help="search no scales for the inputs of linears whose full name contains NAME, for example o_proj",
    )
    method.add_argument("--no-clip", action="store_true", help="skip the search for clipped ranges")
    method.add_argument(
        "--rounding",
        default=defaults.rounding,
        choices=ROUNDINGS,
        help="feedback lets later columns make up for the rounding error of earlier ones (default: %(default)s)",
    )
    method.add_argument(
        "--device",
        default=defaults.device,
        help="that computes: auto (CUDA where there is one), cpu, cuda or cuda:N. Integers may differ between devices "
        "(default: %(default)s)",
    )


def _add_calibration_arguments(parser: argparse.ArgumentParser, defaults: QuantizeOptions) -> None:
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        default=defaults.calibration,
        metavar="TEXT",
        help="'builtin' (English text and code of Python, prose of this package, random tokens), a text file, a .jsonl file, or "
        "a folder of them. A line of a .jsonl file is a string, an object with 'text', or a chat under 'messages', which gets "
        "the model's chat template (default: %(default)s)",
    )
    samples = ", ".join(f"{effort.samples} for {name}" for name, effort in EFFORTS.items())
    calibration.add_argument("--samples", type=int, help=f"sequences (default: by effort, {samples})")
    calibration.add_argument(
        "--sequence-length", type=int, default=defaults.sequence_length, help="tokens of each (default: %(default)s)"
    )
    calibration.add_argument("--seed", type=int, default=defaults.seed, help="for drawing them (default: %(default)s)")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("Hugging Face hub")
    hub.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repository id (default: main)")
    hub.add_argument("--offline", action="store_true", help="use only what is already in the local hub cache")


def options_from_arguments(arguments: argparse.Namespace) -> QuantizeOptions:
    return QuantizeOptions(
        group_size=arguments.group_size,
        format=arguments.format,
        method=arguments.method,
        effort=arguments.effort,
        scales=not arguments.no_scales,
        unscaled_modules=tuple(arguments.unscaled_modules),
        clip=not arguments.no_clip,
        rounding=arguments.rounding,
        calibration=arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        seed=arguments.seed,
        dtype=arguments.dtype,
        device=arguments.device,
        modules_to_not_convert=tuple(arguments.modules_to_not_convert),
        max_shard_bytes=round(arguments.max_shard_size * 1e9),
    )


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
        if parsed.evaluate not in (None, "builtin") and not Path(parsed.evaluate).exists():
            raise QuantizeError(f"evaluate: {parsed.evaluate!r} is neither 'builtin' nor a file or folder")
        # Loads torch: what is wrong with the arguments is said without waiting for it.
        from quantizer.run import quantize

        report = quantize(
            parsed.source,
            parsed.out,
            options_from_arguments(parsed),
            revision=parsed.revision,
            offline=parsed.offline,
            overwrite=parsed.overwrite,
            restart=parsed.restart,
            memory_check=not parsed.no_memory_check,
        )
    except KeyboardInterrupt:
        more = "" if arguments[:1] == ["evaluate"] else "; the same command goes on at the next layer"
        print(f"awq-quantize: interrupted{more}", file=sys.stderr)
        return 130
    except (QuantizeError, OSError) as error:
        print(f"awq-quantize: error: {error}", file=sys.stderr)
        return 1
    megabytes = report["bytes"] / 1e6
    print(f"wrote {parsed.out}: {megabytes:.0f} MB in {report['seconds']:.0f} s; {len(report['layers'])} layers")
    return main(["evaluate", *_evaluation_arguments(parsed)]) if parsed.evaluate else 0


def _evaluation_arguments(parsed: argparse.Namespace) -> list[str]:
    """Of `awq-quantize evaluate`, for what was just written."""
    arguments = [str(parsed.out), "--reference", parsed.source, "--text", parsed.evaluate, "--report"]
    arguments += ["--revision", parsed.revision] if parsed.revision else []
    arguments += ["--device", parsed.device] if parsed.device != "auto" else []
    return [*arguments, "--offline"] if parsed.offline else arguments


if __name__ == "__main__":
    sys.exit(main())
