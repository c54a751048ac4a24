"""The files of a model that the API process needs: where they are, and what the text files among them say."""

from __future__ import annotations

import json
import logging
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from server.api.context import SamplingDefaults

logger = logging.getLogger(__name__)

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "SHA256SUMS"]

# Sampling settings of generation_config.json that would change the output and that this server does not have.
_UNSUPPORTED_DEFAULTS = {"no_repeat_ngram_size": 0}


class ModelFilesError(ValueError):
    """A model that cannot be found or read; one line says what and where."""


def resolve_model(model: str, revision: str | None) -> Path:
    """The folder of a checkpoint: `model` itself, or the download of a Hugging Face id. Raises ModelFilesError."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelFilesError(f"{model}: not a folder; awq-quantize makes one of a .gguf file")
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ModelFilesError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    logger.info("%s: not a local folder; looking for it in the Hugging Face hub", model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub's own errors, the network's, and those of a wrong id
        reason = str(error).strip().splitlines()
        raise ModelFilesError(
            f"{model}: neither a local folder nor available from the hub: {reason[0] if reason else type(error).__name__}"
        ) from error


def served_name(model: str) -> str:
    """What a model is called when nobody says: a folder's own name, or the Hugging Face id."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def ensure_tokenizer_file(directory: Path) -> Path:
    """The checkpoint's tokenizer.json. One that has none (a SentencePiece model alone) has it made once, by transformers.

    It is made in a process of its own, so that neither transformers nor torch stays in this one. Raises ModelFilesError.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        return path
    logger.info("%s: no tokenizer.json; making it from the checkpoint's other tokenizer files", directory)
    target = path if _is_writable(directory) else Path(tempfile.mkdtemp(prefix="awq-serve-")) / "tokenizer.json"
    process = multiprocessing.get_context("spawn").Process(
        target=_convert_tokenizer, args=(str(directory), str(target))
    )
    process.start()
    process.join()
    if process.exitcode != 0 or not target.is_file():
        raise ModelFilesError(f"{directory}: no tokenizer.json, and none can be made of the tokenizer files there")
    return target


def _is_writable(directory: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def _convert_tokenizer(directory: str, target: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory, use_fast=True).backend_tokenizer.save(target)


def load_sampling_defaults(directory: Path, option: str) -> SamplingDefaults:
    """What `--generation-config` says: auto is the model's own folder, none the API's defaults. Raises ModelFilesError."""
    if option == "none":
        return SamplingDefaults()
    path = (directory if option == "auto" else Path(option)) / "generation_config.json"
    if not path.is_file():
        if option != "auto":
            raise ModelFilesError(f"--generation-config {option}: {path}: no such file")
        return SamplingDefaults()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFilesError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelFilesError(f"{path}: expected an object, found {type(config).__name__}")
    return _sampling_defaults(config, path)


def _sampling_defaults(config: dict[str, Any], path: Path) -> SamplingDefaults:
    neutral = SamplingDefaults()

    def number(name: str, default: float | None, low: float, high: float) -> float | None:
        value = config.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ModelFilesError(f"{path}: {name} is {value!r}; expected a number in {low:g}..{high:g}")
        return value

    for name, harmless in _UNSUPPORTED_DEFAULTS.items():
        if config.get(name) not in (None, harmless):
            logger.warning("%s: %s %s is not supported and does not apply", path, name, config[name])
    largest = float(2**31 - 1)
    max_new_tokens = number("max_new_tokens", None, 1, largest)
    defaults = SamplingDefaults(
        temperature=float(number("temperature", neutral.temperature, 0, 2) or 0),
        top_p=float(number("top_p", neutral.top_p, 0, 1) or neutral.top_p),
        top_k=max(0, int(number("top_k", neutral.top_k, -1, largest) or 0)),
        min_p=float(number("min_p", neutral.min_p, 0, 1) or 0),
        typical_p=float(number("typical_p", neutral.typical_p, 0, 1) or neutral.typical_p),
        repetition_penalty=float(number("repetition_penalty", 1.0, 0.01, 100) or 1),
        max_new_tokens=None if max_new_tokens is None else int(max_new_tokens),
    )
    if defaults != neutral:
        logger.info("sampling defaults from %s: %s", path, defaults)
    return defaults
