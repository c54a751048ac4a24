"""Guesses at what a sequence says next, taken from what it has said before.

Text that repeats (code being edited, documents being quoted, lists) goes on after some tokens as it did after the same tokens
earlier. A step computes the guesses along with the token they follow, and the sampler tells which of them are right: those that
equal what it samples at their place. So outputs do not change; what is at stake is the work for guesses that are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.config import NgramSpeculation

_MAX_INDEXED_PER_STEP = 4096  # tokens, a few milliseconds: a long prompt out of the prefix cache comes in several steps

# A sequence's acceptance is a decaying mean, which begins as if it had been tried this often with this many successes.
_PRIOR_TRIED = 2.0
_PRIOR_ACCEPTED = 1.5
_DECAY = 0.8

# Steps between two trials with one draft, where drafts are not worth while: doubled with each, until they are again.
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 64


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a step takes: `fixed`, and `per_row` for every token computed. Only their ratio matters."""

    fixed: float
    per_row: float

    def marginal_share(self, num_rows: int) -> float:
        """The time of one row more over the time per row of a step with `num_rows` rows: a draft that is accepted with a
        lower probability than this costs more than it saves."""
        rows = self.per_row * num_rows
        return rows / (self.fixed + rows)


@dataclass(frozen=True, slots=True)
class Drafting:
    """How drafts are made: whence, when they pay, and how many rows of a step they may take together."""

    ngrams: NgramSpeculation
    step_time: StepTime
    max_rows: int


@dataclass(slots=True)
class DraftCounts:
    """What one step's drafts came to."""

    num_drafts: int = 0
    num_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def add(self, num_tokens: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_tokens += num_tokens
        missing = num_accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for position in range(num_accepted):
            self.accepted_per_position[position] += 1


class NgramIndex:
    """Where each n-gram of a sequence that only grows came last, min_match <= n <= max_match. Growing by a token costs the same
    at every length."""

    def __init__(self, min_match: int, max_match: int) -> None:
        self._sizes = range(min_match, max_match + 1)
        self._followers: dict[tuple[int, ...], int] = {}  # the position after an n-gram's last occurrence that has one
        self._num_indexed = 0  # tokens that are followers already

    def grow(self, token_ids: Sequence[int]) -> bool:
        """Takes in tokens that came since the last call; False while there are more than one step's."""
        last = len(token_ids) - 1
        end = min(last, self._num_indexed + _MAX_INDEXED_PER_STEP)
        for position in range(self._num_indexed + 1, end + 1):
            for size in self._sizes:
                if size <= position:
                    self._followers[tuple(token_ids[position - size : position])] = position
        self._num_indexed = max(self._num_indexed, end)
        return self._num_indexed >= last

    def continuation(self, token_ids: Sequence[int], length: int) -> list[int]:
        """What followed the longest end of the sequence that came before; goes round where that reaches the end itself."""
        for size in reversed(self._sizes):
            if size > len(token_ids):
                continue
            position = self._followers.get(tuple(token_ids[len(token_ids) - size :]))
            if position is not None:
                period = len(token_ids) - position
                return [token_ids[position + offset % period] for offset in range(length)]
        return []


class Drafter:
    """One sequence's drafts. How many it makes follows from how many were accepted."""

    def __init__(self, ngrams: NgramSpeculation) -> None:
        self._num_tokens = ngrams.num_tokens
        self._index = NgramIndex(ngrams.min_match, ngrams.max_match)
        self._tried = _PRIOR_TRIED
        self._accepted = _PRIOR_ACCEPTED
        self._pause = 0
        self._next_pause = _FIRST_PAUSE

    @property
    def chance(self) -> float:
        """That a draft is accepted where all before it were."""
        return self._accepted / self._tried

    def propose(self, token_ids: Sequence[int], limit: int, least_chance: float) -> list[int]:
        """Up to `limit` drafts, no further than each has a chance of `least_chance`; now and then one without it."""
        if not self._index.grow(token_ids):
            return []
        if self._pause:
            self._pause -= 1
            return []
        worthwhile = self._num_worthwhile(least_chance)
        drafts = self._index.continuation(token_ids, min(limit, max(worthwhile, 1)))
        if worthwhile:
            self._next_pause = _FIRST_PAUSE
        elif drafts:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        return drafts

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        """How the last proposal went. Drafts after the first wrong one were not tried."""
        self._tried = self._tried * _DECAY + min(num_drafts, num_accepted + 1)
        self._accepted = self._accepted * _DECAY + num_accepted
        if num_accepted == num_drafts:  # the text may have begun to repeat: no wait for the next trial
            self._pause, self._next_pause = 0, _FIRST_PAUSE

    def _num_worthwhile(self, least_chance: float) -> int:
        number, together = 0, self.chance
        while number < self._num_tokens and together >= least_chance:
            number += 1
            together *= self.chance
        return number
