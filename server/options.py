"""The server's options: one table, read from flags, AWQSERVE_* variables and a YAML file, in that order of precedence.

Names are vLLM's wherever the meaning is the same. A name that is not in the table is refused, wherever it stands.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from server.config import TOOL_CALL_PARSERS, EngineConfig, NgramSpeculation, ServerConfig
from server.edge_options import EDGE_GROUPS
from server.option_types import Option, OptionError
from server.option_types import choice as _choice
from server.option_types import flag as _flag
from server.option_types import integer as _integer
from server.option_types import number as _number
from server.option_types import size as _size
from server.option_types import text_value as _text

ENVIRONMENT_PREFIX = "AWQSERVE_"

_DESCRIPTION = """\
Serve a language model over an OpenAI-compatible API.

MODEL is a checkpoint folder (AWQ 4-bit in the "gemm" layout, or unquantized) or a Hugging Face id. Llama, Mistral,
Qwen2 and Qwen3 models are supported.
"""

_EPILOG = """\
Every option can also come from the environment (AWQSERVE_MAX_MODEL_LEN=4096) or from a YAML file (--config FILE, with
lines like `max-model-len: 4096`; `model` may stand there too). A flag goes before the environment, that before the file.

examples:
  awq-serve models/smollm2-135m-instruct-awq
  awq-serve Qwen/Qwen2.5-0.5B-Instruct-AWQ --port 9000 --max-model-len 8k --served-model-name qwen
  awq-serve --config server.yaml
"""


_MAX_DRAFTS = 32
_MAX_MATCH = 16


def parse_speculation(text: str) -> NgramSpeculation | None:
    """ "none", or ngram:N, ngram:N:MIN-MAX."""
    if text == "none":
        return None
    match = re.fullmatch(r"ngram:([0-9]{1,9})(?::([0-9]{1,9})-([0-9]{1,9}))?", text)
    if match is None:
        raise OptionError(f"{text!r} is neither none nor ngram:N or ngram:N:MIN-MAX with whole numbers")
    defaults = NgramSpeculation(1)
    num_tokens, min_match, max_match = (
        int(group or default)
        for group, default in zip(match.groups(), (0, defaults.min_match, defaults.max_match), strict=True)
    )
    if not 1 <= num_tokens <= _MAX_DRAFTS:
        raise OptionError(f"{text!r}: N {num_tokens} is not in 1..{_MAX_DRAFTS}")
    if not 1 <= min_match <= max_match <= _MAX_MATCH:
        raise OptionError(f"{text!r}: MIN-MAX {min_match}-{max_match} is not within 1..{_MAX_MATCH}, the lower first")
    return NgramSpeculation(num_tokens, min_match, max_match)


_BACKENDS = ("auto", "reference", "cpu", "gpu")
_DEVICES = ("auto", "cpu", "cuda")
_DTYPES = ("auto", "float16", "bfloat16")
_KV_DTYPES = ("auto", "fp16", "int8")
_HEAD_DTYPES = ("auto", "int8", "int4", "fp16")

MODEL = Option("model", "model", _text, "checkpoint folder or Hugging Face id", "MODEL")
GROUPS: dict[str, tuple[Option, ...]] = {
    "HTTP": (
        Option("host", "host", _text, "address to listen on; 0.0.0.0 for all", "ADDRESS"),
        Option("port", "port", _integer(0, 65535), "port to listen on; 0 for any free one", "PORT"),
        Option("served-model-name", "served_model_names", _text, "names that requests may use; the first one is what "
               "responses say (default: the folder's name, or the id)", "NAME", is_list=True),
        Option("chat-template", "chat_template", _text, "jinja file to use instead of the checkpoint's", "FILE"),
        Option(
            "tool-call-parser",
            "tool_call_parser",
            _choice("auto", "none", *TOOL_CALL_PARSERS),
            "how the model writes tool calls; auto: by its chat template",
            "NAME",
        ),
        Option(
            "reasoning-parser",
            "reasoning_parser",
            _choice("auto", "none", "think"),
            "whether <think> parts of answers are reasoning; auto: by the chat template",
            "NAME",
        ),
        Option("generation-config", "generation_config", _text, "where sampling defaults come from: auto (the model's "
               "generation_config.json), none, or a folder that holds one", "auto|none|FOLDER"),
        Option("drain-timeout", "drain_timeout", _number(0, 86400), "seconds that running requests get to finish when "
               "the server is told to stop", "SECONDS"),
    ),
    "model": (
        Option("revision", "revision", _text, "branch, tag or commit of a Hugging Face id", "NAME"),
        Option("max-model-len", "max_model_len", _size, "longest prompt and output together, in tokens (default: the "
               "model's, or what memory holds)", "TOKENS"),
        Option("device", "device", _choice(*_DEVICES), "where the model runs; auto takes a GPU where there is one",
               "|".join(_DEVICES)),
        Option("dtype", "dtype", _choice(*_DTYPES), "of activations on a GPU (default: float16)", "|".join(_DTYPES)),
        Option("batch-invariant", "batch_invariant", _flag, "on a GPU, compute every sum in one order whatever the batch: "
               "a request's tokens then do not depend on its neighbours, as on CPUs always; prompts take longer"),
        Option("kernel-backend", "kernel_backend", _choice(*_BACKENDS), "kernels to compute with", "|".join(_BACKENDS)),
        Option("threads", "threads", _integer(0), "processor threads to compute with; 0: the physical cores available", "N"),
        Option("cpu-activations", "cpu_activations", _choice("int8", "int16"), "what quantized linears on the CPU take: int8, or "
               "int16 with more precision at about half the speed", "int8|int16"),
        Option("lm-head-dtype", "lm_head_dtype", _choice(*_HEAD_DTYPES), "how the CPU kernels keep an unquantized lm_head; auto "
               "is int8", "|".join(_HEAD_DTYPES)),
        Option("verify-checksums", "verify_checksums", _flag, "refuse a checkpoint whose files are not what its SHA256SUMS says; "
               "read beside the load"),
        Option("in-process", "in_process", _flag, "run the engine in a thread of this process, for debugging"),
    ),
    "scheduling and memory": (
        Option("max-num-seqs", "max_num_seqs", _integer(1), "most sequences in one step", "N"),
        Option("max-num-batched-tokens", "max_num_batched_tokens", _size, "most tokens in one step (default: chosen at "
               "load)", "TOKENS"),
        Option("enable-prefix-caching", "enable_prefix_caching", _flag, "keep the KV cache of prompts for requests that "
               "begin the same way"),
        Option("block-size", "block_size", _integer(1), "tokens per KV cache block", "TOKENS"),
        Option("kv-cache-dtype", "kv_cache_dtype", _choice(*_KV_DTYPES), "type of the KV cache: fp16, or int8 with one scale "
               "per token and KV head (default: fp16; the reference kernels keep it in fp32)", "|".join(_KV_DTYPES)),
        Option("kv-cache-memory-bytes", "kv_cache_memory_bytes", _size, "size of the KV cache (default: what "
               "--memory-utilization leaves)", "BYTES"),
        Option("memory-utilization", "memory_utilization", _number(0.01, 1), "share of the memory limit for weights, KV "
               "cache and workspace together", "SHARE", aliases=("gpu-memory-utilization",)),
        Option("scheduling-policy", "scheduling_policy", _choice("fcfs", "priority"), "who is served first: who came first, or "
               "whose `priority` is lower", "fcfs|priority"),
        Option("priority-aging-seconds", "priority_aging_seconds", _number(0.001, 86400), "seconds of waiting that are worth "
               "one level of priority", "SECONDS"),
        Option("speculative", "speculative", parse_speculation, "guess up to N tokens of each sequence ahead, where its last 4 "
               "to 2 (or MAX to MIN) tokens came before, and check them in one step; outputs do not change, text that "
               "repeats comes faster (default: none)", "ngram:N[:MIN-MAX]"),
        Option("seed", "seed", _integer(0), "makes requests without a seed repeatable", "N"),
    ),
    **EDGE_GROUPS,
}  # fmt: skip
OPTIONS = (MODEL, *(option for group in GROUPS.values() for option in group))
_BY_NAME = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="awq-serve",
        usage="awq-serve MODEL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL.help)
    parser.add_argument("--config", metavar="FILE", help="YAML file with options")
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add_argument(group, option)
    return parser


def _add_argument(group: argparse._ArgumentGroup, option: Option) -> None:
    default = option.default
    shown = option.help
    if default not in (None, MISSING, ()) and "(default:" not in shown:
        shown += f" (default: {str(default).lower() if option.is_flag else default})"
    flags = [f"--{name}" for name in (option.name, *option.aliases)]
    if option.is_flag:
        group.add_argument(*flags, dest=option.field, help=shown, action=argparse.BooleanOptionalAction)
    elif option.is_list and option.one_each:
        group.add_argument(*flags, dest=option.field, help=shown, metavar=option.metavar, action="append")
    elif option.is_list:
        group.add_argument(*flags, dest=option.field, help=shown, metavar=option.metavar, nargs="+", action="extend")
    else:
        group.add_argument(*flags, dest=option.field, help=shown, metavar=option.metavar)


def parse_options(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> ServerConfig:
    """The configuration. Wrong options end the process with a line that names them, as argparse does (exit code 2)."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    try:
        return _combine(given, environment)
    except OptionError as error:
        parser.error(str(error))


def _combine(given: dict[str, Any], environment: Mapping[str, str]) -> ServerConfig:
    from_environment = _read_environment(environment)
    path = given.pop("config", from_environment.pop("config", None))
    values = {} if path is None else _read_file(Path(path))
    values |= from_environment
    for option in OPTIONS:
        if option.field in given:
            values[option.field] = _parse_given(option, given[option.field])
    if "model" not in values:
        raise OptionError("MODEL is missing: give a checkpoint folder or a Hugging Face id")
    engine_fields = {item.name for item in fields(EngineConfig)}
    engine = EngineConfig(**{name: value for name, value in values.items() if name in engine_fields})
    return ServerConfig(engine, **{name: value for name, value in values.items() if name not in engine_fields})


def _parse_given(option: Option, value: Any) -> Any:
    if option.is_flag:
        return value
    source = "MODEL" if option is MODEL else f"--{option.name}"
    if option.is_list:
        return tuple(_named(source, _text, name) for name in value)
    return _named(source, option.from_text, value)


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("_", "-")
        if name == "config":
            values["config"] = text
            continue
        option = _find(name, variable, lambda known: ENVIRONMENT_PREFIX + known.upper().replace("-", "_"))
        values[option.field] = _named(variable, option.from_text, text)
    return values


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise OptionError(f"--config {path}: expected `option: value` lines, found a {type(content).__name__}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        option = _find(str(key).replace("_", "-"), f"{path}: {key}", str)
        values[option.field] = _named(f"{path}: {key}", option.from_yaml, value)
    return values


def _find(name: str, shown: str, spell: Callable[[str], str]) -> Option:
    if name in _BY_NAME:
        return _BY_NAME[name]
    close = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"; did you mean {spell(close[0])}?" if close else ""
    raise OptionError(f"{shown}: unknown option{hint}")


def _named(source: str, parse: Callable[[Any], Any], value: Any) -> Any:
    try:
        return parse(value)
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from None
