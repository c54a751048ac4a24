"""How many threads the pool gets: the physical cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> tuple[int, str]:
    """Physical cores within the affinity mask and the cgroup's quota, and how they were counted."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_core_of(cpu) for cpu in cpus})
    quota = cgroup_quota()
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"cgroup quota of {quota:g} cores, below {cores} physical cores allowed"
    return cores, f"{cores} physical cores allowed"


def _core_of(cpu: int) -> tuple[str, str]:
    """(package, core) of a logical CPU, itself where the system does not say."""
    folder = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "cpu", str(cpu)


def cgroup_quota(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The tightest CPU quota, in cores, of this process's cgroup and those above it (v2, else v1); None if unlimited."""
    quotas = [_v1_quota(root / "cpu")]
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = (root / "cpu" if controllers else root) / path.lstrip("/")
        while folder.is_relative_to(root):
            quotas.append(_v1_quota(folder) if controllers else _v2_quota(folder))
            folder = folder.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _v2_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _v1_quota(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 else None
