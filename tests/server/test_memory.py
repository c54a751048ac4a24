"""Memory limits from cgroups, and how the KV pool is planned from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import EngineConfig
from server.engine.kv_cache import plan_kv_cache
from server.memory import MemoryLimit, memory_limit
from server.model_config import ModelError

GIB = 1 << 30


def write_meminfo(path: Path, total: int, available: int) -> Path:
    path.write_text(f"MemTotal: {total // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available // 1024} kB\n")
    return path


def test_the_host_is_the_limit_without_cgroups(tmp_path: Path) -> None:
    meminfo = write_meminfo(tmp_path / "meminfo", 8 * GIB, 6 * GIB)
    assert memory_limit(tmp_path / "none", meminfo) == MemoryLimit(8 * GIB, 6 * GIB, "host memory")


def test_a_cgroup_limit_goes_first_and_page_cache_counts_as_free(tmp_path: Path) -> None:
    meminfo = write_meminfo(tmp_path / "meminfo", 8 * GIB, 6 * GIB)
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 2}\n")
    v1 = tmp_path / "memory"
    v1.mkdir()
    for new, old in (("max", "limit_in_bytes"), ("current", "usage_in_bytes"), ("stat", "stat")):
        (v1 / f"memory.{old}").write_text((tmp_path / f"memory.{new}").read_text())
    limit = memory_limit(tmp_path, meminfo)
    assert (limit.total, limit.available) == (2 * GIB, GIB + GIB // 2) and "cgroup" in limit.source


@pytest.mark.parametrize("text", ["max\n", str(2**63 - 4096)])
def test_an_unlimited_cgroup_is_no_limit(text: str, tmp_path: Path) -> None:
    meminfo = write_meminfo(tmp_path / "meminfo", 8 * GIB, 6 * GIB)
    (tmp_path / "memory.max").write_text(text)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(text)
    assert memory_limit(tmp_path, meminfo).source == "host memory"


LIMIT = MemoryLimit(8 * GIB, 6 * GIB, "host memory")
BLOCK = 1 << 20


def plan(config: EngineConfig, limit: MemoryLimit = LIMIT, max_positions: int = 4096):  # type: ignore[no-untyped-def]
    return plan_kv_cache(config, max_positions, BLOCK, 100 << 20, 0, limit)


def test_the_default_pool_is_a_quarter_of_the_limit_and_says_how_memory_is_split() -> None:
    plan_ = plan(EngineConfig("m"))
    assert plan_.num_blocks == 2 * GIB // BLOCK and plan_.max_model_len == 4096
    assert "weights 100 MiB" in plan_.notes[0] and "32768 tokens" in plan_.notes[0]


def test_a_small_model_takes_no_more_than_its_sequences_can_use() -> None:
    assert plan(EngineConfig("m", max_model_len=64, max_num_seqs=2)).num_blocks == 8


def test_the_context_shrinks_to_the_memory_unless_it_was_asked_for() -> None:
    tight = MemoryLimit(GIB, 400 << 20, "cgroup limit x")
    shrunk = plan(EngineConfig("m", memory_utilization=0.8), tight, max_positions=100_000)
    assert shrunk.max_model_len == shrunk.num_blocks * 16 < 100_000
    with pytest.raises(ModelError, match=r"--max-model-len 90000 does not fit"):
        plan(EngineConfig("m", max_model_len=90_000), tight, max_positions=100_000)


def test_what_cannot_be_is_refused_by_flag_and_number() -> None:
    with pytest.raises(ModelError, match=r"--max-model-len 5000 is more than the model's context of 4096"):
        plan(EngineConfig("m", max_model_len=5000))
    with pytest.raises(
        ModelError, match=r"--kv-cache-memory-bytes \d+ is more than the \d+ bytes left of the host memory"
    ):
        plan(EngineConfig("m", kv_cache_memory_bytes=7 * GIB))
