"""Whole-slide pathology analysis. Research use only.

Examples
--------
>>> import wsi
>>> with wsi.open_slide("slide.svs") as slide:                          # doctest: +SKIP
...     rgb = slide.read(wsi.Box(0, 0, 4096, 4096), (512, 512))
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: Loaded when first asked for: `import wsi` costs milliseconds.
_HOME = {
    "Box": "units",
    "Engine": "engine",
    "EngineConfig": "engine",
    "Heatmap": "heatmap",
    "MilModel": "nn.grade",
    "Mpp": "units",
    "PatchModel": "nn.patch",
    "PatchStore": "store",
    "ScoreConfig": "engine",
    "Slide": "slide",
    "TileConfig": "tile",
    "TileGrid": "grid",
    "TissueConfig": "tissue",
    "TissueMask": "tissue",
    "WsiError": "errors",
    "embed_slide": "embed",
    "find_slides": "archive",
    "find_tissue": "tissue",
    "load_encoder": "nn.encoder",
    "load_mil_model": "nn.grade",
    "load_patch_model": "nn.patch",
    "open_slide": "slide",
    "score_archive": "archive",
    "score_slide": "run",
    "tile_archive": "archive",
    "tile_slide": "tile",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"wsi.{_HOME[name]}"), name)
    raise AttributeError(f"module 'wsi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
