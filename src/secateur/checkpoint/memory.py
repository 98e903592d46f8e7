"""How much memory a process started now may take."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Folder of a hierarchy -> its files with limit and usage, and what the usage counts though it can be given back.
FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),  # cgroup v2
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # v1
}


def available_memory() -> int:
    """Bytes: the least of what the machine has left, what control groups leave, and the limits of a process."""
    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    own = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    free: int = psutil.virtual_memory().available
    return max(0, min([free, *own, *_left_by_groups()]))


def _left_by_groups() -> Iterator[int]:
    """What each control group this process is in, and each one above it, leaves [bytes]."""
    if not MEMBERSHIP.is_file():
        return
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        hierarchy = "memory" if "memory" in controllers.split(",") else controllers
        if hierarchy not in FILES:
            continue
        top = CGROUPS / hierarchy
        group = top / path.lstrip("/")
        for place in (group, *(p for p in group.parents if p.is_relative_to(top))):
            if (left := _left(place, *FILES[hierarchy])) is not None:
                yield left


def _left(group: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """What one group leaves; None if it sets no limit, or cannot be seen from here."""
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + int(counters.get(reclaimable, 0))
