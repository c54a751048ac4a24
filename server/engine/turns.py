"""Whose prompt is computed next where several clients' wait: start-time fair queueing by prompt tokens."""

from __future__ import annotations


class Turns:
    """Gives every request a place on a line, in prompt tokens: the end of its client's previous request, or where the work is now
    if that is further on. Whoever has the least place goes first; a prompt's place moves on as it is computed.

    A client whose requests came one after the other has places in that order: with one client nothing changes. With N that wait,
    nobody's next chunk comes after more than one of each of the others', however much one of them has sent. Tokens found in the
    prefix cache count as computed ones do.
    """

    def __init__(self) -> None:
        self._now = 0
        self._ends: dict[str, int] = {}  # by client, as many as there are API keys

    def place(self, client: str, num_tokens: int) -> int:
        """For a new request of so many prompt tokens."""
        start = max(self._now, self._ends.get(client, 0))
        self._ends[client] = start + num_tokens
        return start

    def give_back(self, client: str, num_tokens: int) -> None:
        """Of a request that ended before so many of its prompt's tokens were computed."""
        self._ends[client] -= num_tokens

    def serve(self, place: int) -> None:
        """Work has come to this place."""
        self._now = max(self._now, place)
