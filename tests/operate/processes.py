"""How much memory a server's processes hold for themselves, and whether it grows."""

from __future__ import annotations

import re
from pathlib import Path


def pss(pid: int) -> int:
    """Bytes: shared pages count in part. Pages of files are left out: what their part is depends on who else runs this Python."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) for name, size in re.findall(r"^(Pss(?:_File)?):\s+(\d+) kB", text, re.MULTILINE)}
    return (sizes["Pss"] - sizes["Pss_File"]) * 1024


def descendants(pid: int) -> set[int]:
    """All processes that this one has started, and those that they have."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:  # it has ended
                continue
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def process_tree(pid: int) -> dict[str, int]:
    """ "server" and "engine" (what holds most of those that it has started) to their process ids."""
    sizes = {}
    for child in descendants(pid):
        try:
            sizes[pss(child)] = child
        except OSError:
            continue
    return {"server": pid, "engine": sizes[max(sizes)]}


class Growth:
    """Samples of one process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: list[tuple[float, int]] = []  # (seconds, bytes)

    def sample(self, seconds: float, pid: int) -> None:
        self.samples.append((seconds, pss(pid)))

    @property
    def last(self) -> int:
        return self.samples[-1][1] if self.samples else 0


def slope_per_10_minutes(growth: Growth, after: float) -> float:
    """Of the least-squares line through the samples after `after` seconds, as a share of their mean."""
    samples = [sample for sample in growth.samples if sample[0] >= after]
    mean_time = sum(seconds for seconds, _ in samples) / len(samples)
    mean_bytes = sum(size for _, size in samples) / len(samples)
    spread = sum((seconds - mean_time) ** 2 for seconds, _ in samples)
    if not spread:
        return 0.0
    slope = sum((seconds - mean_time) * (size - mean_bytes) for seconds, size in samples) / spread
    return slope * 600 / mean_bytes
