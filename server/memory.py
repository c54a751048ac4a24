"""How much memory and how many processors this process may use: its cgroup's limits and its affinity first, the host's second."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes: the limit in force, and what of it is still free. `source` says which limit it is, for the log."""

    total: int
    available: int
    source: str


def memory_limit(root: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> MemoryLimit:
    """The tightest cgroup limit on the way up from this process's group, or the host's memory."""
    host = _host_memory(meminfo)
    best = host
    for limit_file, usage_file, inactive in _cgroup_files(root):
        limit, usage = _read_int(limit_file), _read_int(usage_file)
        if limit is None or limit >= min(_UNLIMITED, best.total):
            continue
        # Page cache counts as usage but is given back under pressure.
        reclaimable = _inactive_file(inactive)
        available = max(0, limit - max(0, (usage or 0) - reclaimable))
        best = MemoryLimit(limit, min(available, host.available), f"cgroup limit {limit_file}")
    return best


def _cgroup_files(root: Path) -> list[tuple[Path, Path, Path]]:
    groups: list[tuple[Path, Path, Path]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "memory.stat")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        else:
            continue
        group = base / path.lstrip("/")
        while True:
            groups.append((group / names[0], group / names[1], group / names[2]))
            if group in (base, group.parent):
                break
            group = group.parent
    return groups


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_file(stat: Path) -> int:
    try:
        for line in stat.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _host_memory(meminfo: Path) -> MemoryLimit:
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = (os.sysconf(key) * page for key in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return MemoryLimit(total, available, "host memory")
