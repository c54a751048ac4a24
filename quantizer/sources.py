"""Where the original weights come from: a safetensors folder, the Hugging Face hub or a GGUF file.

A source hands out one tensor at a time under its transformers name, so no reader ever holds a whole model.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from quantizer.config import QuantizeError
from quantizer.mappings import WRAPPERS, find_architecture
from quantizer.mixtures import checkpoint_shapes

logger = logging.getLogger(__name__)

SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Carried over unchanged: tokenizer, chat templates, generation defaults and the terms of the weights."""

HUB_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", *SIDE_FILES)

_IGNORED_TENSORS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old versions of transformers saved; they are computed, never loaded."""

_REPOSITORY_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Source(Protocol):
    """An unquantized model. `config` is transformers' view, `config_json` the object to write beside the weights."""

    description: str
    config: PretrainedConfig
    config_json: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """What the unquantized parts are stored as."""

    def names(self) -> frozenset[str]:
        """Names of all tensors, in transformers' spelling."""

    def load(self, name: str) -> Tensor:
        """One tensor as stored (GGUF: dequantized to fp32). QuantizeError if it is missing or not as stated."""

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def weight_files(self) -> list[Path]:
        """The files whose contents decide the weights and the config."""

    def write_side_files(self, folder: Path) -> None:
        """Puts tokenizer, chat template and generation config into `folder`."""


class SafetensorsSource:
    """A local checkpoint folder, sharded or not."""

    def __init__(self, folder: Path, description: str | None = None) -> None:
        self.folder = folder
        self.description = description or str(folder)
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise QuantizeError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder")
        self.config_json: dict[str, Any] = json.loads(config_path.read_text())
        self.config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        self._files = self._locate()
        self._stored_names = {name: name for name in self._files}
        self._unwrap()
        self._dtype: torch.dtype | None = None

    def _unwrap(self) -> None:
        """Of a model that holds a decoder beside other things, the decoder alone."""
        wrapper = WRAPPERS.get(self.config.model_type)
        if wrapper is None:
            return
        self.config_json, self.config = wrapper.config(self.config_json), self.config.text_config
        self.config.architectures = [wrapper.architecture]
        renamed = {stored: wrapper.rename(stored) for stored in self._files}
        self._stored_names = {name: stored for stored, name in renamed.items() if name is not None}
        self._files = {name: self._files[stored] for name, stored in self._stored_names.items()}
        logger.info("%s: %d tensors beside the decoder are left out", self.description, len(renamed) - len(self._files))

    def _locate(self) -> dict[str, str]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            missing = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
            if missing:
                raise QuantizeError(f"{index}: names {missing[0]}, which is not in {self.folder}")
            return {name: file for name, file in weight_map.items() if not _IGNORED_TENSORS.search(name)}
        if single.is_file():
            with _open(single) as handle:
                return {name: single.name for name in list(handle.keys()) if not _IGNORED_TENSORS.search(name)}
        others = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in self.folder.glob(pattern)
        )
        hint = f"; found {others[0]} (convert it to safetensors, or name a .gguf file itself)" if others else ""
        raise QuantizeError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json{hint}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights as stored, taken from the tensor whose name sorts first."""
        if self._dtype is None:
            self._dtype = self.load(min(self._files)).dtype
        return self._dtype

    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def load(self, name: str) -> Tensor:
        if name not in self._files:
            raise QuantizeError(f"{self.description}: tensor {name} is missing")
        path = self.folder / self._files[name]
        with _open(path) as handle:
            try:
                tensor: Tensor = handle.get_tensor(self._stored_names[name])
            except SafetensorError as error:
                raise QuantizeError(f"{path}: cannot read tensor {name}: {error}") from error
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def weight_files(self) -> list[Path]:
        return [self.folder / name for name in ("config.json", *sorted(set(self._files.values())))]

    def write_side_files(self, folder: Path) -> None:
        for pattern in SIDE_FILES:
            for path in sorted(self.folder.glob(pattern)):
                if path.is_file():
                    target = folder / path.relative_to(self.folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    # Follows links: a hub cache is links into a blob store.
                    shutil.copyfile(path, target)


def open_source(name: str, revision: str | None = None, offline: bool = False) -> Source:
    """Finds what SOURCE means: a folder, a .gguf file or a repository id on the hub.

    revision: branch, tag or commit, for the hub only. offline: use only what the hub's local cache holds.
    """
    from quantizer.gguf_source import GgufSource

    path = Path(name)
    if path.exists() and revision is not None:
        raise QuantizeError(f"--revision {revision} needs a repository id, but {name} is a local path")
    if path.is_dir():
        return _unquantized(SafetensorsSource(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise QuantizeError(f"{name}: expected a checkpoint folder or a .gguf file")
        return GgufSource(path)
    if not _REPOSITORY_ID.fullmatch(name):
        raise QuantizeError(f"{name}: no such file or folder, and not a repository id of the form owner/name")
    return _unquantized(SafetensorsSource(_download(name, revision, offline), f"{name}@{revision or 'main'}"))


def _download(repository: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repository, revision=revision, local_files_only=offline, allow_patterns=list(HUB_FILES))
        )
    except LocalEntryNotFoundError as error:
        where = "the local cache (--offline)" if offline else "the hub or the local cache"
        raise QuantizeError(f"{repository}@{revision or 'main'}: not found in {where}: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise QuantizeError(f"{repository}@{revision or 'main'}: cannot download: {error}") from error


def _unquantized(source: SafetensorsSource) -> SafetensorsSource:
    quantization = source.config_json.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "an unnamed method")
        raise QuantizeError(f"{source.description}: already quantized with {method}; give the original checkpoint")
    return source


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the dense model's checkpoint and its shape; a tied lm_head is left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return checkpoint_shapes(find_architecture(config), shapes)


def check_tensors(source: Source) -> dict[str, tuple[int, ...]]:
    """The tensors to convert, after checking that the source has all of them and nothing it cannot account for."""
    shapes = expected_shapes(source.config)
    names = source.names()
    missing = sorted(shapes.keys() - names)
    if missing:
        raise QuantizeError(f"{source.description}: tensor {missing[0]} is missing ({len(missing)} in all)")
    allowed = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
    unknown = sorted(names - shapes.keys() - allowed)
    if unknown:
        raise QuantizeError(f"{source.description}: unexpected tensor {unknown[0]} ({len(unknown)} in all)")
    return shapes


def load_checked(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    """Loads one tensor and checks that it is floating point, of the config's shape, and finite."""
    tensor = source.load(name)
    if tuple(tensor.shape) != shape:
        raise QuantizeError(f"{source.description}: {name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise QuantizeError(f"{source.description}: {name}: expected floating point, found {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise QuantizeError(f"{source.description}: {name}: holds infinite or undefined values")
    return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise QuantizeError(f"{path}: not a readable safetensors file: {error}") from error
