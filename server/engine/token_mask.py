"""Sets of tokens as bits, in host memory: what grammars give and back ends take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class TokenMask:
    """The tokens of a vocabulary that may come next. Bit i of word w is token 32 w + i."""

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._words = words

    @classmethod
    def of(cls, token_ids: Sequence[int], vocab_size: int) -> TokenMask:
        """These tokens; ids past the vocabulary are passed over."""
        words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        for token_id in token_ids:
            if token_id < vocab_size:
                words[token_id // 32] |= np.uint32(1 << token_id % 32)
        return cls(words)

    @classmethod
    def from_bytes(cls, bits: bytes, vocab_size: int) -> TokenMask:
        """Bit i of byte b is token 8 b + i. Where bytes are too few the rest may not come; what is past the vocabulary
        is cut."""
        mask = cls.of((), vocab_size)
        space = mask._words.view(np.uint8)
        count = min(len(bits), len(space))
        space[:count] = np.frombuffer(bits, dtype=np.uint8, count=count)
        if vocab_size % 32:
            mask._words[-1] &= np.uint32((1 << vocab_size % 32) - 1)
        return mask

    def __and__(self, other: TokenMask) -> TokenMask:
        return TokenMask(self._words & other._words)

    def has_any_besides(self, token_ids: Iterable[int]) -> bool:
        """Whether a token is left when these are taken out."""
        words = self._words.copy()
        for token_id in token_ids:
            if token_id // 32 < len(words):
                words[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
        return bool(words.any())

    def to_tensor(self) -> Tensor:
        """int32 [ceil(vocabulary / 32)], as `Backend.adjust_row` takes it."""
        return torch.from_numpy(self._words.view(np.int32))
