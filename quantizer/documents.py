"""Text of the user's own to calibrate on or to score: files, lines of JSON, chats and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from quantizer.config import QuantizeError

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
"""Files of a calibration folder that are read; others are passed over."""


def read_documents(calibration: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Documents of a text file, a .jsonl file or a folder with such files at any depth.

    A line of a .jsonl file is a string, an object with `text`, or an object with `messages`: a chat, which becomes text by
    the tokenizer's chat template.
    """
    path = Path(calibration)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise QuantizeError(f"calibration: {calibration!r} is neither 'builtin' nor a file or folder")
    if not files:
        raise QuantizeError(f"{path}: holds no file of {', '.join(TEXT_SUFFIXES)}")
    documents = [document for file in files for document in _documents(file, tokenizer) if document.strip()]
    if not documents:
        raise QuantizeError(f"{path}: holds no text")
    return documents


def _documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantizeError(f"{path}: not UTF-8 text: {error}") from error
    return list(_jsonl(path, text, tokenizer)) if path.suffix == ".jsonl" else [text]


def _jsonl(path: Path, text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    # Only a line feed ends a line: inside a JSON string other separators are text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise QuantizeError(f"{path}:{number}: not JSON: {error}") from error
        if isinstance(record, dict) and "messages" in record:
            yield _chat(f"{path}:{number}", record["messages"], tokenizer)
            continue
        value = record.get("text") if isinstance(record, dict) else record
        if not isinstance(value, str):
            raise QuantizeError(
                f"{path}:{number}: expected a string, or an object with a string under 'text' or a chat under 'messages'"
            )
        yield value


def _chat(where: str, messages: object, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the model sees it. QuantizeError, naming the line, if there is no template or it cannot take the chat."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and "role" in message for message in messages
    ):
        raise QuantizeError(f"{where}: messages: expected a list of objects with 'role' and 'content'")
    if not tokenizer.chat_template:
        raise QuantizeError(f"{where}: is a chat, but the model has no chat template; give 'text' instead")
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise QuantizeError(f"{where}: the chat template refuses it: {error}") from error
    return text
