"""Blocks of the paged KV cache: reference counts, and the prefix cache over them.

Every block is in exactly one state: free (no content), used (referenced by at least one sequence) or cached (referenced by none,
content valid and findable by hash). A cached block is evicted, least recently used first, when no free one is left.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """free + used + cached == total, always."""

    total: int
    free: int
    used: int
    cached: int

    def check(self) -> None:
        assert min(self.free, self.used, self.cached) >= 0 and self.free + self.used + self.cached == self.total, self


def hash_block(parent: bytes, token_ids: list[int], extra_key: str) -> bytes:
    """SHA-256 over the parent block's hash, the block's tokens and the request's extra key: equal hashes mean equal prefixes."""
    digest = hashlib.sha256(parent)
    digest.update(array("q", token_ids).tobytes())
    digest.update(extra_key.encode())
    return digest.digest()


class BlockManager:
    """Allocates blocks to sequences. Predicates never change anything; changes assert their predicate."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Dicts keep insertion order and delete in O(1): queues from which any block can be taken.
        # The block freed last is taken first: it has memory behind it already, which a pool gets as it is written.
        self._free: dict[int, None] = dict.fromkeys(reversed(range(num_blocks)))
        self._cached: dict[int, None] = {}
        self._references = [0] * num_blocks
        self._num_used = 0
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    # Queries.
    @property
    def num_available(self) -> int:
        """Blocks that can be had: free ones, and cached ones by eviction."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> BlockCounts:
        return BlockCounts(self.num_blocks, len(self._free), self._num_used, len(self._cached))

    def check(self) -> None:
        """Asserts that every block is in exactly one state and that the hashes and their index agree. O(num_blocks)."""
        self.counts.check()
        assert self._num_used == sum(1 for references in self._references if references)
        assert not self._free.keys() & self._cached.keys()
        for block, references in enumerate(self._references):
            key = self._hashes[block]
            assert (references > 0) + (block in self._free) + (block in self._cached) == 1, block
            assert key is None or self._by_hash[key] == block, block
            assert block not in self._free or key is None, block
            assert block not in self._cached or key is not None, block
        assert len(self._by_hash) == sum(1 for key in self._hashes if key is not None)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the sequence's longest known prefix. The last token is never among them: it must be
        computed to give logits."""
        if not self.enable_prefix_caching:
            return []
        blocks: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._by_hash.get(self._hash(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_allocate(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether blocks for all of the sequence's tokens can be had, given the cached `prefix`."""
        needed = self.blocks_for(sequence.num_tokens) - len(prefix)
        # Cached blocks of the prefix itself stop being available once it is referenced.
        reserved = sum(1 for block in prefix if not self._references[block])
        return needed <= self.num_available - reserved

    # Changes.
    def allocate(self, sequence: Sequence, prefix: list[int]) -> None:
        """Gives the sequence blocks for all its tokens; the prefix's are shared and count as computed."""
        assert not sequence.block_table and self.can_allocate(sequence, prefix)
        for block in prefix:
            self._cached.pop(block, None)
            self._reference(block)
        sequence.block_table = list(prefix)
        sequence.num_computed_tokens = len(prefix) * self.block_size
        self.extend(sequence)

    def can_extend(self, sequence: Sequence, num_drafts: int = 0) -> bool:
        return self.blocks_for(sequence.num_tokens + num_drafts) - len(sequence.block_table) <= self.num_available

    def extend(self, sequence: Sequence, num_drafts: int = 0) -> None:
        """Appends blocks until all the sequence's tokens have a place, and `num_drafts` after them."""
        assert self.can_extend(sequence, num_drafts)
        for _ in range(self.blocks_for(sequence.num_tokens + num_drafts) - len(sequence.block_table)):
            sequence.block_table.append(self._take())

    def num_spare_slots(self, sequence: Sequence) -> int:
        """Places after the sequence's tokens in blocks that it has."""
        return len(sequence.block_table) * self.block_size - sequence.num_tokens

    def trim(self, sequence: Sequence) -> None:
        """Gives back blocks that held nothing but drafts."""
        while len(sequence.block_table) > self.blocks_for(sequence.num_tokens):
            block = sequence.block_table.pop()
            assert self._references[block] == 1 and self._hashes[block] is None
            self._dereference(block)

    def publish(self, sequence: Sequence, num_computed_before: int) -> None:
        """Makes the blocks filled since `num_computed_before` findable. Called once their keys and values are written."""
        if not self.enable_prefix_caching:
            return
        for index in range(num_computed_before // self.block_size, sequence.num_computed_tokens // self.block_size):
            block, key = sequence.block_table[index], self._hash(sequence, index)
            # Two sequences may have computed the same block at the same time: the first one's is kept.
            if self._hashes[block] is None and key not in self._by_hash:
                self._hashes[block] = key
                self._by_hash[key] = block

    def forget(self, sequence: Sequence) -> None:
        """Makes the sequence's blocks such that no other finds them from now on; those who have them keep them."""
        for block in sequence.block_table:
            key = self._hashes[block]
            if key is not None:
                del self._by_hash[key]
                self._hashes[block] = None

    def free(self, sequence: Sequence) -> None:
        """Returns the sequence's blocks: the one way out, however the sequence ended. The last blocks go first, so that a
        prefix outlives what follows it."""
        for block in reversed(sequence.block_table):
            self._dereference(block)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def _take(self) -> int:
        if self._free:
            block, _ = self._free.popitem()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            key = self._hashes[block]
            assert key is not None
            del self._by_hash[key]
            self._hashes[block] = None
        assert not self._references[block]
        self._reference(block)
        return block

    def _reference(self, block: int) -> None:
        self._num_used += not self._references[block]
        self._references[block] += 1

    def _dereference(self, block: int) -> None:
        assert self._references[block] > 0
        self._references[block] -= 1
        if not self._references[block]:
            self._num_used -= 1
            (self._free if self._hashes[block] is None else self._cached)[block] = None

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """Hash of the sequence's full block `index`, computed once: tokens never change."""
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size], sequence.request.cache_key))
        return hashes[index]
