"""Slides and jobs that behave badly, for processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slide.make import halved, section, write_pyramid
from wsi.tile import TileConfig

CONFIG = TileConfig(mpp=1.0, tile_px=32, pixels="zstd")


def write_slides(folder: Path, n: int) -> list[str]:
    """Write small slides, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(n):
        full = section(seed=seed)
        write_pyramid(folder / f"s{seed}.svs", [full, halved(full)], 0.5, svs=True)
    return sorted(map(str, folder.iterdir()))


def at_start(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every process that is started from now on run some code first."""
    (folder / "path").mkdir()
    (folder / "path/sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder / "path"))


#: What a bad decoder does to a worker, told by the slide's name.
SABOTAGE = """
import os, signal, time

def spoil():
    import wsi.archive.jobs as jobs
    tile_slide = jobs.tile_slide
    def spoilt(path, *arguments, **more):
        name = os.path.basename(path)
        if "segfault" in name:
            import ctypes
            ctypes.string_at(0)
        if "kill" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "exit" in name:
            os._exit(7)
        if "hang" in name:
            time.sleep(3600)
        if "busy" in name:
            for i in range(1 << 40):
                more["progress"]("tiles", i, 1 << 40)
        if "greedy" in name:
            hoard = [b"x" * (1 << 20) for _ in range(1 << 11)]
            time.sleep(3600)
        return tile_slide(path, *arguments, **more)
    jobs.tile_slide = spoilt

spoil()
"""
