"""The checkpoint's chat template: messages to prompt text, in jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplateError(ValueError):
    """The template refuses the messages, or fails on them. The message is the template's."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Templates mean plain JSON; jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """`special_tokens` are the names that templates use for them (bos_token, eos_token, ...)."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self._special_tokens = dict(special_tokens or {})
        self._knows_developer = "developer" in source
        self.source = source
        self.knows_tools = "tools" in source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `developer` becomes `system` for templates that do not know it. Raises ChatTemplateError."""
        if not self._knows_developer:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
            ]
        # Templates test `tools is not none`: for those, an undefined variable would count as tools.
        names = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        names |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(names)
        except Exception as error:  # a template is a program: with odd messages it can fail in any way
            raise ChatTemplateError(f"the chat template cannot render these messages: {error}") from error


def load_chat_template(directory: Path, override: Path | None = None) -> ChatTemplate | None:
    """The template of a checkpoint folder, or of the file `override`; None where there is none. Raises ValueError."""
    tokenizer_config = _read_json(directory / "tokenizer_config.json")
    special_tokens: dict[str, str] = {}
    for config in (_read_json(directory / "special_tokens_map.json"), tokenizer_config):
        for name in _SPECIAL_TOKENS:
            value = config.get(name)
            if isinstance(value, dict):  # an AddedToken
                value = value.get("content")
            if isinstance(value, str):
                special_tokens[name] = value
    source = _template_source(directory, tokenizer_config, override)
    if source is None:
        return None
    return ChatTemplate(source, special_tokens)


def _template_source(directory: Path, tokenizer_config: dict[str, Any], override: Path | None) -> str | None:
    if override is not None:
        if not override.is_file():
            raise ValueError(f"--chat-template: {override}: no such file")
        return override.read_text(encoding="utf-8")
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = _read_json(directory / "chat_template.json").get("chat_template", tokenizer_config.get("chat_template"))
    if isinstance(source, list):  # named templates: [{"name", "template"}]
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, found {type(value).__name__}")
    return value
