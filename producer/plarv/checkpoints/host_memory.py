"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional

__all__ = ["available_bytes"]

_MEMINFO = Path("/proc/meminfo")
_LIMITS = (  # (limit, used) of the control group, version 2 and 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_bytes() -> Optional[int]:
    """The machine's available memory, or what the control group leaves of it; None: unknown."""
    found: List[int] = []
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass  # another system: the control group may still know
    for limit, used in _LIMITS:
        try:
            taken = int(used.read_text(encoding="ascii")) - _cached(used.parent / "memory.stat")
            left = int(limit.read_text(encoding="ascii")) - taken
        except (OSError, ValueError):  # not there, or "max"
            continue
        found.append(max(0, left))
    return min(found) if found else None


def _cached(statistics: Path) -> int:
    """Bytes of files that the kernel keeps only while nobody needs the memory."""
    for line in statistics.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
