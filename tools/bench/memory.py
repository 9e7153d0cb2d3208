"""The most memory that a call takes beyond what is there before it, as the operating system counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Sets the process's high-water mark to what is resident now (proc(5)).
_RESET_PEAK = "5"


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Return the bytes by which resident memory grows at most while ``call`` runs; None where Linux does not tell.

    What the call returns counts, and so does what it keeps.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator holds would hide growth
    try:
        _CLEAR.write_text(_RESET_PEAK)
        before = _kilobytes("VmRSS")
    except (OSError, ValueError):
        return None
    kept = call()
    peak = _kilobytes("VmHWM")
    del kept
    return 1024 * max(peak - before, 0)


def _kilobytes(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
