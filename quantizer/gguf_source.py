"""A GGUF file as a source: tensors through the `gguf` package, config and tokenizer through transformers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from quantizer.config import QuantizeError
from quantizer.mappings import find_architecture

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose tensors mean here what they mean there, but for the order below. (Gemma's norms, for one, have 1 added.)"""

_PERMUTED_ARCHITECTURES = ("llama",)
"""GGUF architectures whose q and k rows are stored in pairs (2i, 2i+1) rather than halves (i, i + head_dim/2)."""

_SPLIT_DIGITS = ("smollm",)
"""`tokenizer.ggml.pre` values that isolate every digit before the byte-level split, which transformers leaves out."""


class _Reader(gguf.GGUFReader):
    """The package's reader over a plain array: slicing a `numpy.memmap`, as it does per token, takes three times as long."""

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = mapped.view(np.ndarray)


class GgufSource:
    """One .gguf file of an architecture the quantizer knows. Tensors come dequantized to fp32, one at a time."""

    dtype = torch.float16

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = str(path)
        try:
            self._reader = _Reader(path)
        except (ValueError, OSError) as error:
            raise QuantizeError(f"{path}: not a readable GGUF file: {error}") from error
        self._gguf_architecture = str(self._field("general.architecture"))
        if self._gguf_architecture not in _ARCHITECTURES:
            raise QuantizeError(
                f"{path}: GGUF architecture {self._gguf_architecture} is not supported; supported: {', '.join(_ARCHITECTURES)}; "
                "give the safetensors checkpoint"
            )
        self.config: PretrainedConfig = self._transformers(AutoConfig)
        architecture = find_architecture(self.config)
        self.config.architectures = [architecture.name]
        self._set_head_size()
        self.config_json = _config_json(self.config)
        self._tensors = self._map_tensors()

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise QuantizeError(f"{self.path}: metadata {key} is missing")
        return field.contents()

    def _set_head_size(self) -> None:
        """Takes the head size from the file: transformers reads it for some architectures and assumes it for others."""
        sizes = [
            self._reader.get_field(f"{self._gguf_architecture}.attention.{part}_length") for part in ("key", "value")
        ]
        lengths = {int(size.contents()) for size in sizes if size is not None}
        if len(lengths) > 1:
            raise QuantizeError(f"{self.path}: keys and values of different lengths ({lengths}) are not supported")
        if lengths:
            self.config.head_dim = lengths.pop()

    def _transformers(self, factory: Any) -> Any:
        try:
            with self._shared_reader():
                return factory.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)
        except (ValueError, NotImplementedError, KeyError) as error:
            raise QuantizeError(f"{self.path}: architecture {self._gguf_architecture}: {error}") from error

    @contextlib.contextmanager
    def _shared_reader(self) -> Iterator[None]:
        """Transformers opens and parses the file at each call, for seconds: meanwhile it gets what is open already."""
        reader = gguf.GGUFReader

        def opened(path: Any, *arguments: Any, **keywords: Any) -> gguf.GGUFReader:
            own = Path(path) == self.path and not arguments and not keywords
            return self._reader if own else reader(path, *arguments, **keywords)

        setattr(gguf, "GGUFReader", opened)  # noqa: B010  (mypy knows classes as unassignable)
        try:
            yield
        finally:
            setattr(gguf, "GGUFReader", reader)  # noqa: B010

    def _map_tensors(self) -> dict[str, gguf.ReaderTensor]:
        """Transformers' names for the file's tensors, by the gguf package's own table."""
        from quantizer.sources import expected_shapes

        known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(known[self._gguf_architecture], self.config.num_hidden_layers)
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        mapped = {}
        for name in expected_shapes(self.config):
            stem, _, suffix = name.rpartition(".")
            gguf_name = f"{table.get_name(stem)}.{suffix}"
            if gguf_name in stored:
                mapped[name] = stored.pop(gguf_name)
        if stored:
            raise QuantizeError(f"{self.path}: cannot convert tensor {min(stored)} ({len(stored)} of its kind in all)")
        return mapped

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def load(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise QuantizeError(f"{self.path}: tensor {name} is missing")
        stored = self._tensors[name]
        try:
            values = gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise QuantizeError(f"{self.path}: {stored.name}: cannot dequantize {stored.tensor_type.name}") from error
        values = np.ascontiguousarray(values, dtype=np.float32)
        if self._gguf_architecture in _PERMUTED_ARCHITECTURES:
            if ".attn_q." in stored.name:
                values = unpermute(values, self.config.num_attention_heads)
            elif ".attn_k." in stored.name:
                values = unpermute(values, self.config.num_key_value_heads)
        # The reader maps the file read-only; a copy is the caller's own.
        return torch.from_numpy(values.copy())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:  # whose tokens take transformers seconds to read
        tokenizer = self._transformers(AutoTokenizer)
        field = self._reader.get_field("tokenizer.ggml.pre")
        if field is not None and field.contents() in _SPLIT_DIGITS:
            backend = tokenizer.backend_tokenizer
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
            )
        tokenizer.model_max_length = self.config.max_position_embeddings
        return tokenizer

    def weight_files(self) -> list[Path]:
        return [self.path]

    def write_side_files(self, folder: Path) -> None:
        self.tokenizer().save_pretrained(folder)
        special = {
            key: getattr(self.config, key)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if getattr(self.config, key, None) is not None
        }
        GenerationConfig(**special).save_pretrained(folder)


def unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's interleaved rotary order back to halves. values: [heads * head_dim, ...]."""
    half = values.shape[0] // num_heads // 2
    paired = values.reshape(num_heads, half, 2, *values.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)


def _config_json(config: PretrainedConfig) -> dict[str, Any]:
    """config.json for a model that never had one; rotary settings also under the names older readers know."""
    data: dict[str, Any] = config.to_dict()
    data.pop("_name_or_path", None)
    data.pop("_model_name_or_path", None)
    rope = data.get("rope_parameters") or {}
    if "rope_theta" in rope:
        data["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        data["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return data
