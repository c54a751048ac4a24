"""Calibration: text to token sequences, and one decoder layer at a time run over them."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from quantizer.config import QuantizeError
from quantizer.documents import read_documents
from quantizer.mappings import Architecture, attention_implementation
from quantizer.prose import PROSE

BATCH_TOKENS = 4096
"""Tokens run through a layer at once: enough to keep the matmuls busy, little enough to bound memory."""

_DOCSTRING_MODULES = (
    "argparse asyncio collections configparser csv datetime decimal difflib doctest email enum fractions functools "
    "heapq html http imaplib ipaddress json logging mailbox multiprocessing optparse os pathlib pickle random re "
    "sched shutil smtplib socket statistics string subprocess tarfile textwrap threading turtle unittest "
    "urllib uuid weakref zipfile"
)
"""Standard modules with long docstrings, separated by spaces."""


def builtin_documents(held_out: bool = False) -> list[str]:
    """The technical half of the builtin text: Python's help topics and long docstrings, as every installation has them.

    Markup and code are dropped paragraph by paragraph. One document in eight is held out for evaluation.
    """
    from pydoc_data.topics import topics

    technical = [_prose(text) for _, text in sorted(topics.items())]
    technical += [_prose(text) for text in _docstrings()]
    technical = [text for text in technical if len(text) > 400]
    return [text for index, text in enumerate(technical) if (index % 8 == 7) == held_out]


def general_documents() -> list[str]:
    """The general half of the builtin text: this package's own pieces, plain and with punctuation set apart."""
    pieces = [" ".join(piece.split()) for piece in PROSE.split("\n\n")]
    return [*pieces, *(_set_apart(piece) for piece in pieces)]


_SOURCE_MODULES = "html.parser ftplib plistlib email.message http.client xml.dom.minidom"
"""Standard modules whose source is calibrated on as code. None has docstrings in the builtin text, part of which is held out."""


def code_documents() -> list[str]:
    """Source code of the standard library. Brackets, tags, operators and digits are rare in prose and common in use."""
    return [inspect.getsource(importlib.import_module(name)) for name in _SOURCE_MODULES.split()]


def _set_apart(text: str) -> str:
    """Punctuation as words of its own, the form of older corpora (WikiText among them), whose tokens plain text never shows."""
    text = re.sub(r"(?<!\d)([,.;:])|([,.;:])(?!\d)", r" \1\2", text)
    text = re.sub(r"([!?()])|(\"\B|\B\")|('s)\b", r" \1\2\3 ", text)
    return re.sub(r"\s+", " ", text).strip()


def _docstrings() -> Iterator[str]:
    for name in _DOCSTRING_MODULES.split():
        module = importlib.import_module(name)
        members = [module, *(member for _, member in sorted(vars(module).items()) if _belongs(member, name))]
        texts = [inspect.getdoc(member) for member in members]
        yield "\n\n".join(text for text in texts if text)


def _belongs(member: object, module: str) -> bool:
    """Whether a module's member is a class of its own: imported ones would be read twice."""
    return inspect.isclass(member) and str(member.__module__).startswith(module)


def _prose(text: str) -> str:
    """Paragraphs that read as sentences, unwrapped, without reStructuredText's marks."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = re.sub(r"\s+", " ", paragraph).strip()
        line = re.sub(r"[*`]+([^*`]+)[*`]+", r"\1", line).replace("\u201c", '"').replace("\u201d", '"')
        letters = sum(character.isalpha() or character == " " for character in line)
        if len(line) > 80 and letters > 0.9 * len(line) and line[0].isupper() and line[-1] in ".:!?":
            kept.append(line)
    return "\n\n".join(kept)


def pack_tokens(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> Tensor:
    """All documents end to end, an end-of-sequence token between them, cut into rows of `length`. int64 [rows, length].

    Nothing is discarded but the last incomplete row.
    """
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens = [token for ids in encoded for token in (*ids, *separator)]
    rows = len(tokens) // length
    if rows == 0:
        raise QuantizeError(f"sequence_length: {length} tokens asked for, but the text has only {len(tokens)}")
    return torch.tensor(tokens[: rows * length], dtype=torch.int64).reshape(rows, length)


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, calibration: str, samples: int, length: int, seed: int
) -> Tensor:
    """int64 [samples, length]: rows drawn without replacement; fewer where the text is shorter, and then all of it.

    The builtin rows are a third general pieces (or as many as there are), a quarter code, a sixth tokens drawn at random from
    the whole vocabulary, and prose of Python's documentation for the rest. No text of this size shows most tokens even once, and
    the first layers' inputs are little else than the tokens' embeddings: what random rows add is the moment of those unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    if calibration != "builtin":
        return _draw(pack_tokens(tokenizer, read_documents(calibration, tokenizer), length), samples, generator)
    general = _draw(pack_tokens(tokenizer, general_documents(), length), -(-samples // 3), generator)
    code = _draw(pack_tokens(tokenizer, code_documents(), length), samples // 4, generator)
    # A tokenizer may know more tokens than the model has embeddings for, or fewer.
    vocabulary = sorted(set(range(min(vocab_size, len(tokenizer)))) - set(tokenizer.all_special_ids))
    choice = torch.randint(len(vocabulary), (samples // 6, length), generator=generator)
    scattered = torch.tensor(vocabulary, dtype=torch.int64)[choice]
    technical = pack_tokens(tokenizer, builtin_documents(), length)
    rest = samples - len(general) - len(code) - len(scattered)
    return torch.cat([general, code, scattered, _draw(technical, rest, generator)])


def _draw(rows: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(rows.shape[0], generator=generator)[:samples]]


@dataclass(frozen=True, slots=True)
class InputStatistics:
    """What is kept of a linear's inputs x (K channels): E[x xT] and E[|x|], in fp32, over `num_tokens` tokens."""

    second_moment: Tensor
    mean_abs: Tensor
    num_tokens: int

    def scaled(self, scales: Tensor) -> InputStatistics:
        """The statistics of x / scales."""
        moment = self.second_moment / scales / scales[:, None]
        return InputStatistics(moment, self.mean_abs / scales, self.num_tokens)


class _Captured(Exception):
    """Ends a forward pass once the last input wanted from it has been seen."""


class _Collector:
    """A forward pre-hook that sums x xT and |x| of one module."""

    def __init__(self, channels: int, last: bool) -> None:
        self.last = last
        self.moment = torch.zeros(channels, channels)
        self.absolute = torch.zeros(channels)
        self.num_tokens = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        rows = arguments[0].reshape(-1, self.moment.shape[0])
        self.moment.addmm_(rows.t(), rows)
        self.absolute += rows.abs().sum(0)
        self.num_tokens += rows.shape[0]
        if self.last:
            raise _Captured

    def result(self) -> InputStatistics:
        """Once, at the end: the sums become the means, in place."""
        return InputStatistics(self.moment.div_(self.num_tokens), self.absolute.div_(self.num_tokens), self.num_tokens)


def _batches(hidden: Tensor) -> tuple[Tensor, ...]:
    """Whole sequences, BATCH_TOKENS tokens at a time."""
    return hidden.split(max(1, BATCH_TOKENS // hidden.shape[1]))


class LayerRunner:
    """Runs hidden states through single decoder layers built from the config, in fp32.

    Only the layer it is given is in memory; the model as a whole never exists.
    """

    def __init__(self, config: PretrainedConfig, architecture: Architecture) -> None:
        self.config = copy.deepcopy(config)
        self.config._attn_implementation = attention_implementation(config)
        self.architecture = architecture
        self._rotary = architecture.rotary_type(self.config)

    def build(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """A layer with these tensors (names relative to the layer), shared, not copied."""
        with torch.device("meta"):
            layer = self.architecture.layer_type(self.config, index)
        layer.load_state_dict(tensors, assign=True, strict=True)
        return layer.eval().requires_grad_(False)

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """hidden: fp32 [sequences, length, hidden size]; returns the layer's output, of the same shape."""
        return torch.cat([self._forward(layer, index, chunk) for chunk in _batches(hidden)])

    def _forward(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        mask = self._mask(index)(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        kind = {"layer_type": self.config.layer_types[index]} if self.architecture.rotary_by_layer_type else {}
        output: Tensor = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self._rotary(hidden, position_ids=positions, **kind),
        )
        return output

    @torch.no_grad()
    def capture(self, layer: nn.Module, index: int, hidden: Tensor) -> list[InputStatistics]:
        """Input statistics of each of the architecture's scale groups, in order, from one pass."""
        collectors, handles = [], []
        for group in self.architecture.groups:
            linear = layer.get_submodule(group.linears[0])
            assert isinstance(linear, nn.Linear)
            collectors.append(_Collector(linear.in_features, last=group is self.architecture.groups[-1]))
            handles.append(linear.register_forward_pre_hook(collectors[-1]))
        try:
            for chunk in _batches(hidden):
                # The last group's output is nobody's input here, so its matmul is not done.
                with contextlib.suppress(_Captured):
                    self._forward(layer, index, chunk)
        finally:
            for handle in handles:
                handle.remove()
        return [collector.result() for collector in collectors]

    def _mask(self, index: int) -> Callable[..., Tensor | None]:
        kinds = getattr(self.config, "layer_types", None)
        sliding = kinds[index] == "sliding_attention" if kinds else getattr(self.config, "sliding_window", None)
        return create_sliding_window_causal_mask if sliding else create_causal_mask
