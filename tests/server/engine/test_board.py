"""The board: an entry is there whole or not at all, also for a reader that looks while it is written."""

from __future__ import annotations

import threading

from server.engine.board import Board


def test_entries_replace_each_other() -> None:
    for board in (Board(is_shared=False), Board(is_shared=True)):
        assert board.read().request_ids == frozenset() and board.read().serial == 0
        board.write(["a", "b"], 1.5)
        entry = board.read()
        assert (entry.request_ids, entry.predicted_seconds, entry.serial) == ({"a", "b"}, 1.5, 1)
        board.write()
        assert board.read().request_ids == frozenset() and board.read().serial == 2
        board.write([f"request-{index:060}" for index in range(2000)], 0.5)
        assert board.read().request_ids is None and board.read().predicted_seconds == 0.5


def test_a_reader_never_sees_half_an_entry() -> None:
    board, done = Board(is_shared=True), threading.Event()

    def write() -> None:
        for number in range(20_000):
            board.write([f"{number}"] * (number % 50 + 1), number)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set():
        entry = board.read()
        if entry.serial:
            assert entry.request_ids == {f"{int(entry.predicted_seconds)}"}
            seen += 1
    writer.join()
    assert seen
