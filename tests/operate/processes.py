"""A server's processes: which they are, how much memory they hold for themselves, and whether it grows."""

from __future__ import annotations

import re
from pathlib import Path


def pss(pid: int) -> int:
    """Bytes: shared pages count in part. Pages of files are left out: what their part is depends on who else runs this Python."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(size) for name, size in re.findall(r"^(Pss(?:_File)?):\s+(\d+) kB", text, re.MULTILINE)}
    return (sizes["Pss"] - sizes["Pss_File"]) * 1024


def engine_pid(server_pid: int) -> int | None:
    """The child of the server that has torch loaded."""
    for path in Path(f"/proc/{server_pid}/task").glob("*/children"):
        try:
            for child in path.read_text().split():
                if "libtorch" in Path(f"/proc/{child}/maps").read_text():
                    return int(child)
        except OSError:  # a thread or a child has ended
            continue
    return None


def process_tree(pid: int) -> dict[str, int]:
    """ "server" and "engine", as far as it runs, to their process ids."""
    engine = engine_pid(pid)
    return {"server": pid} if engine is None else {"server": pid, "engine": engine}


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
