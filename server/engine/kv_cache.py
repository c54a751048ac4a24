"""How large the KV pool is: planned from the memory limit, what the weights left of it, and what the context needs."""

from __future__ import annotations

from dataclasses import dataclass

from server.config import EngineConfig
from server.memory import MemoryLimit
from server.model_config import ModelError

DEFAULT_POOL_SHARE = 0.25
"""Share of the memory limit that the pool takes at most when nobody said how large it should be."""

GPU_POOL_SHARE = 1.0
"""The same for a GPU's memory, which nothing else is waiting for."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """`notes` are log lines that say how memory is split."""

    num_blocks: int
    max_model_len: int
    notes: tuple[str, ...]


def plan_kv_cache(
    config: EngineConfig,
    max_positions: int,
    block_nbytes: int,
    weights_nbytes: int,
    workspace_nbytes: int,
    limit: MemoryLimit,
    pool_share: float = DEFAULT_POOL_SHARE,
) -> KVCachePlan:
    """Sizes the pool. `block_nbytes` is one block over all layers; `limit` as it stands with the weights loaded.

    `max_model_len` unset is the model's context, shortened to what the pool holds; set, it must fit. Raises ModelError,
    naming the flag and what would fit, when it does not.
    """
    if config.max_model_len is not None and config.max_model_len > max_positions:
        raise ModelError(
            f"--max-model-len {config.max_model_len} is more than the model's context of {max_positions} tokens"
        )
    wanted_len = config.max_model_len or max_positions
    size = config.block_size
    # Room that the limit leaves: not more than its share, and not more than what is free right now.
    reserve = int(limit.total * (1 - config.memory_utilization))
    room = max(0, limit.available - reserve - workspace_nbytes)
    if config.kv_cache_memory_bytes is not None:
        pool = config.kv_cache_memory_bytes
        if pool > room:
            raise ModelError(
                f"--kv-cache-memory-bytes {pool} is more than the {room} bytes left of the {limit.source} "
                f"of {limit.total} bytes"
            )
    else:
        one_sequence = -(-wanted_len // size) * block_nbytes
        every_sequence = one_sequence * config.max_num_seqs
        pool = min(room, every_sequence, max(one_sequence, int(limit.total * pool_share)))
    num_blocks = pool // block_nbytes
    num_tokens = num_blocks * size
    max_model_len = wanted_len
    if num_tokens < wanted_len:
        if config.max_model_len is not None or num_tokens < 2 * size:
            raise ModelError(
                f"--max-model-len {wanted_len} does not fit: the KV pool of {pool / MIB:.0f} MiB holds {num_tokens} tokens; "
                "lower it, or raise --kv-cache-memory-bytes or the memory limit"
            )
        max_model_len = num_tokens
    return KVCachePlan(
        num_blocks,
        max_model_len,
        (
            f"memory: {limit.source} {limit.total / MIB:.0f} MiB, {limit.available / MIB:.0f} MiB available; "
            f"weights {weights_nbytes / MIB:.0f} MiB, workspace up to {workspace_nbytes / MIB:.0f} MiB, "
            f"KV pool {num_blocks * block_nbytes / MIB:.0f} MiB = {num_blocks} blocks of {size} = {num_tokens} tokens",
            f"max_model_len {max_model_len} (the model's context is {max_positions})",
        ),
    )
