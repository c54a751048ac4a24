"""Grammars' sources: limits on what users send, and what may come before a grammar."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from server import grammar
from server.engine import matcher
from server.engine.matcher import GrammarFactory
from server.grammar import GrammarError, GrammarService, GrammarSource
from server.text import Tokenizer
from tests.server.real_edge import VOCAB_SIZE, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_grammars_that_take_too_much_are_killed_and_the_next_one_is_served(model: Path) -> None:
    patterns = {f"p{index}": {"type": "string", "pattern": f"^.*{index}.*$"} for index in range(3000)}
    slow = GrammarSource("json", json.dumps({"type": "object", "properties": patterns}))

    async def check() -> None:
        service = GrammarService(model / "tokenizer.json", compile_seconds=0.3)
        began = time.monotonic()
        assert await service.compile(GrammarSource("regex", "a"))
        started = time.monotonic() - began
        for _ in range(2):  # the second is remembered
            with pytest.raises(GrammarError, match=r"longer than 0\.3 s"):
                await service.compile(slow)
        assert service._process is None and time.monotonic() - began < started + 5
        assert await service.compile(GrammarSource("regex", "b"))
        service._seconds = 60.0
        process = service._process
        assert process is not None and process.is_alive()
        process.kill()  # as the end of its memory does
        process.join()
        with pytest.raises(GrammarError, match="memory"):
            await service.compile(GrammarSource("regex", "c"))
        assert await service.compile(GrammarSource("regex", "d"))
        service.close()

    asyncio.run(check())


def test_grammars_that_would_hold_everybody_up_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their masks are made within the steps that all share."""
    tokenizer = grammar.load_grammar_tokenizer(model / "tokenizer.json")
    source = GrammarSource("regex", "[a-z]{1,9}")
    compiled = grammar._compile(source, tokenizer)
    monkeypatch.setattr(grammar, "MAX_MASK_SECONDS", -1.0)
    with pytest.raises(ValueError, match="to find the tokens that may come first"):
        grammar._compile(source, tokenizer)
    factory = GrammarFactory(model / "tokenizer.json", VOCAB_SIZE, frozenset())
    started = factory.start(compiled).result(30)
    assert started.allowed(VOCAB_SIZE) is not None and not started.error
    monkeypatch.setattr(matcher, "_MOST_SECONDS", -1.0)
    assert started.allowed(VOCAB_SIZE) is None and "to find the tokens that may come next" in started.error
    factory.close()


def test_a_process_that_does_not_start_is_no_grammars_fault(tmp_path: Path, model: Path) -> None:
    async def check() -> None:
        service = GrammarService(tmp_path / "tokenizer.json")
        source = GrammarSource("regex", "a")
        with pytest.raises(GrammarError, match="not available"):
            await service.compile(source)
        shutil.copy(model / "tokenizer.json", tmp_path)
        assert await service.compile(source)
        service.close()

    asyncio.run(check())


def test_what_is_remembered_has_a_bound() -> None:
    service = GrammarService(Path("none"))
    for index in range(1000):
        service._remember(GrammarSource("regex", f"{index}" * 20_000), GrammarError("no"))
    assert 0 < service._cached_length <= 2**24 and len(service._cache) <= 256
    assert service._cached_length == sum(len(s.text) + len(str(r)) for s, r in service._cache.items())


@pytest.mark.parametrize(
    ("reasoning", "text", "is_whole"),
    [
        ("begun", "a < b\n</think>\n\nyes", True),
        ("begun", "yes", False),
        ("begun", "a</think>b", None),
        ("possible", "<think>a</think>yes", True),
        ("possible", "yes", True),
        ("possible", "<think>yes", False),
        ("possible", "no", None),
        ("none", "<think>", None),
    ],
)
def test_reasoning_before_a_grammar_where_tags_are_text(
    model: Path, reasoning: Any, text: str, is_whole: bool | None
) -> None:
    """None: the text is refused on the way."""

    async def check() -> None:
        service = GrammarService(model / "tokenizer.json")
        grammar = await service.compile(GrammarSource("choice", '["yes"]', reasoning))
        service.close()
        matcher = GrammarFactory(model / "tokenizer.json", VOCAB_SIZE, frozenset({2})).start(grammar).result(10)
        accepted = [
            matcher.accept(token) for token in Tokenizer.from_file(model / "tokenizer.json").encode(text, False)
        ]
        assert all(accepted) == (is_whole is not None)
        if is_whole is not None:
            assert matcher.is_complete == is_whole

    asyncio.run(check())
