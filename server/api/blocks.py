"""An answer as a row of blocks, reasoning, text and calls, each of which begins, grows and ends: what the Responses and Messages
APIs are made of."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal

from server.api.answer import AnswerPiece
from server.api.call_scanner import CallStart

Change = Literal["start", "delta", "stop"]


@dataclass(slots=True)
class Block:
    """`text` is what the block holds so far; of a call, its arguments."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    name: str = ""  # of a call's function
    text: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])


@dataclass(frozen=True, slots=True)
class BlockChange:
    change: Change
    block: Block
    text: str = ""  # of a delta


class Blocks:
    """The blocks of one answer. At most one, the last, is open."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._is_open = False

    def add(self, piece: AnswerPiece) -> list[BlockChange]:
        changes: list[BlockChange] = []
        if piece.reasoning:
            self._grow("reasoning", piece.reasoning, changes)
        if piece.content:
            self._grow("text", piece.content, changes)
        for event in piece.calls:
            if isinstance(event, CallStart):
                self._start("call", changes, event.name)
            else:
                self._grow("call", event.text, changes)
        return changes

    def finish(self) -> list[BlockChange]:
        changes: list[BlockChange] = []
        self._stop(changes)
        return changes

    def _grow(self, kind: Literal["reasoning", "text", "call"], text: str, changes: list[BlockChange]) -> None:
        if not self._is_open or self.blocks[-1].kind != kind:
            self._start(kind, changes)
        block = self.blocks[-1]
        block.text += text
        changes.append(BlockChange("delta", block, text))

    def _start(self, kind: Literal["reasoning", "text", "call"], changes: list[BlockChange], name: str = "") -> None:
        self._stop(changes)
        self.blocks.append(Block(len(self.blocks), kind, name))
        self._is_open = True
        changes.append(BlockChange("start", self.blocks[-1]))

    def _stop(self, changes: list[BlockChange]) -> None:
        if self._is_open:
            changes.append(BlockChange("stop", self.blocks[-1]))
        self._is_open = False
