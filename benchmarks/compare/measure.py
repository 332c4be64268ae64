"""What the comparisons share: facts of the machine, versions, and a table in which what failed says why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, str]:
    """Name processor, cores this process may use, and Python."""
    names = [platform.processor() or platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {"cpu": f"{names[0]} ({len(cores())} cores)", "python": platform.python_version()}


def cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def bind(core: int) -> None:
    """Keep this process on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of each package, or that it is not installed."""
    found = {}
    for package in sorted(set(packages)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_mib() -> int | None:
    """Peak resident memory of this process; none where the system does not say (getrusage counts the parent's too)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), None)


def reason_of(error: BaseException) -> str:
    """Say in a line why a program gave nothing."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def print_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table in Markdown; a row with a `reason` shows that in place of its numbers."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    lines = []
    for row in rows:
        cells = [cell(row.get(key)) for key in columns]
        if "reason" in row:
            first_empty = cells.index("")
            cells[first_empty] = row["reason"]
        lines.append(cells)
    shown = [list(columns.values()), *lines]
    widths = [max(len(line[i]) for line in shown if len(line[i]) < 40) for i in range(len(columns))]
    shown.insert(1, ["-" * width for width in widths])
    for line in shown:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |")
