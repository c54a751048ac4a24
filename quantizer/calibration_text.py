"""Text to calibrate and to score on: what `builtin` consists of, and documents cut into rows of tokens."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from importlib import resources

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantizer.config import QuantizeError
from quantizer.documents import read_documents

_DOCSTRING_MODULES = (
    "argparse asyncio collections configparser csv datetime decimal difflib doctest email enum fractions functools "
    "heapq html http imaplib ipaddress json logging mailbox multiprocessing optparse os pathlib pickle random re "
    "sched shutil smtplib socket statistics string subprocess tarfile textwrap threading turtle unittest "
    "urllib uuid weakref zipfile"
)
"""Standard modules with long docstrings, separated by spaces."""


def builtin_documents(held_out: bool = False) -> list[str]:
    """The technical part of the builtin text: Python's help topics and long docstrings, as every installation has them.

    Markup and code are dropped paragraph by paragraph. One document in eight is held out for evaluation.
    """
    from pydoc_data.topics import topics

    technical = [_prose(text) for _, text in sorted(topics.items())]
    technical += [_prose(text) for text in _docstrings()]
    technical = [text for text in technical if len(text) > 400]
    return [text for index, text in enumerate(technical) if (index % 8 == 7) == held_out]


def general_documents() -> tuple[list[str], list[str]]:
    """The general part of the builtin text, prose.txt: its pieces plain, and the same in the form of WikiText.

    Written for this package, with people, places, dates, numbers, dialogue, instructions and questions, of which Python's help has
    none; all names and events are invented. Two blank lines separate pieces, one separates paragraphs; a line between equals signs
    is a title.
    """
    prose = resources.files("quantizer").joinpath("prose.txt").read_text(encoding="utf-8").strip()
    pieces = [[" ".join(part.split()) for part in piece.split("\n\n")] for piece in prose.split("\n\n\n")]
    rare = _rare_words(prose)
    plain = ["\n\n".join(part.strip("= ") for part in parts) for parts in pieces]
    return plain, ["".join(f" {_set_apart(part, rare)} \n" for part in parts) for parts in pieces]


_SOURCE_MODULES = "html.parser ftplib plistlib email.message http.client xml.dom.minidom"
"""Standard modules whose source is calibrated on as code. None has docstrings in the builtin text, part of which is held out."""


def code_documents() -> list[str]:
    """Source code of the standard library. Brackets, tags, operators and digits are rare in prose and common in use."""
    return [inspect.getsource(importlib.import_module(name)) for name in _SOURCE_MODULES.split()]


def _rare_words(text: str) -> frozenset[str]:
    """Long words that occur once: with them gone, one word in twenty is, as in WikiText-2."""
    counts = Counter(re.findall(r"[^\W\d_]+", text))
    return frozenset(word for word, count in counts.items() if count == 1 and len(word) >= 9)


def _set_apart(text: str, rare: Set[str]) -> str:
    """A line in the form of WikiText and corpora like it, whose tokens plain text never shows.

    Punctuation is a word of its own, inside words and numbers between at signs; words in `rare` are `<unk>`.
    """
    text = re.sub(r"[^\W\d_]+", lambda word: "<unk>" if word[0] in rare else word[0], text)
    text = re.sub(r"(?<=\d)-(?=\d)", " \u2013 ", text)
    text = re.sub(r"(?<=[\w>])-(?=[\w<])|(?<=\d)[,.](?=\d)", r" @\g<0>@ ", text)
    text = re.sub(r"(?<![\d@])([,.;:])|([,.;:])(?![\d@])", r" \1\2", text)
    text = re.sub(r"([!?()$£])|(\"\B|\B\")|('s)\b", r" \1\2\3 ", text)
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

    The builtin rows are four sevenths general pieces (or as many as there are), half of them plain, a seventh code, an eighth
    tokens drawn at random from the whole vocabulary, and prose of Python's documentation for the rest. No text of this size shows
    most tokens even once, and the first layers' inputs are little else than the tokens' embeddings: what random rows add is the
    moment of those unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    if calibration != "builtin":
        return _draw(pack_tokens(tokenizer, read_documents(calibration, tokenizer), length), samples, generator)
    plain, apart = (pack_tokens(tokenizer, documents, length) for documents in general_documents())
    general = torch.cat([_draw(plain, -(-samples * 2 // 7), generator), _draw(apart, samples * 2 // 7, generator)])
    code = _draw(pack_tokens(tokenizer, code_documents(), length), samples // 7, generator)
    # A tokenizer may know more tokens than the model has embeddings for, or fewer.
    vocabulary = sorted(set(range(min(vocab_size, len(tokenizer)))) - set(tokenizer.all_special_ids))
    choice = torch.randint(len(vocabulary), (samples // 8, length), generator=generator)
    scattered = torch.tensor(vocabulary, dtype=torch.int64)[choice]
    technical = pack_tokens(tokenizer, builtin_documents(), length)
    rest = samples - len(general) - len(code) - len(scattered)
    return torch.cat([general, code, scattered, _draw(technical, rest, generator)])


def _draw(rows: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(rows.shape[0], generator=generator)[:samples]]
