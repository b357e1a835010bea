"""Peak memory of one call, in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowformer.bench.registry import OPERATIONS, Shape, contenders

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
WARM_LENGTH = 32  # loads code and starts threads before the measured call


def measure(operation: str, contender: str, shape: dict[str, int]) -> dict[str, Any]:
    """Bytes of a call above what the process held when its inputs were made. For a fresh process: see ``worker``.

    On Linux the peak is reset before the call (``/proc/self/clear_refs``) and read after it (``VmHWM``). Elsewhere it
    is the growth of ``ru_maxrss``, which is too small if imports and inputs had once needed more than they hold.

    Returns:
        ``peak_bytes``, ``bytes_per_token`` and ``method``.
    """
    row, what, sizes = contenders()[operation, contender], OPERATIONS[operation], Shape(**shape)
    small = replace(sizes, length=min(WARM_LENGTH, sizes.length))
    what.bind(row.function, what.inputs(small, row.dtype, row.layout)).run()
    call = what.bind(row.function, what.inputs(sizes, row.dtype, row.layout))
    _give_back()
    method = "VmHWM" if _reset_peak() else "ru_maxrss"
    before = _status("VmRSS") if method == "VmHWM" else _max_rss()
    out = call.run()
    peak = _status("VmHWM") if method == "VmHWM" else _max_rss()
    del out
    used = max(0, peak - before)
    return {"peak_bytes": used, "bytes_per_token": used / what.tokens(sizes), "method": method}


def available_bytes() -> int | None:
    """Memory that can be had without swapping, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _give_back() -> None:
    """Return freed memory to the system, since the call could reuse it unseen."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5", encoding="ascii")
        return bool(_status("VmHWM"))
    except (OSError, StopIteration):
        return False


def _status(name: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _max_rss() -> int:
    import resource  # not on Windows

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
