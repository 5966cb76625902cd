"""The machine that was measured, described without its name or place."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["cores", "describe", "memory_bytes"]


def cores() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The size of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def describe(threads: int) -> dict[str, Any]:
    """The processor, its memory, and the versions of what runs on it."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": threads,
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
