"""What the comparisons share: facts of the machine, versions, and a table in which what failed says why."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LOOK_S = 0.2  # between two looks at a program's memory


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


def watched(command: Sequence[str], environment: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Run a command: exit code, seconds by the wall and of CPU, peak memory (MiB) of it and its children together."""
    begun = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    peak = 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, _tree_mib(process.pid))
        time.sleep(LOOK_S)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime  # of the children that it waited for, too
    return {"code": process.returncode, "wall_s": wall, "cpu_s": cpu, "peak_mib": peak or None}


def _tree_mib(pid: int | str) -> float:
    """Resident memory of a process and all below it; a page that n of them share is an nth of a page for each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return own + sum(_tree_mib(child) for task in tasks for child in task.read_text().split())
    except (OSError, StopIteration):  # it has ended
        return 0.0


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
