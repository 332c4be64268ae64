"""``wsi info``: show a slide's geometry and reader."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def info(
    slide: Annotated[str, typer.Argument(help="A slide file or URL.")],
    reader: Annotated[str, typer.Option(help="auto, tiff, openslide or tiffslide.")] = "auto",
    slide_mpp: Annotated[float | None, typer.Option(help="Microns per level-0 pixel; overrides the file's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show size, levels, microns per pixel and their source, bounds and reader.

    Label, macro image and vendor properties are not read.

    Examples:
      wsi info slide.svs

      wsi info https://example.org/slide.svs --json
    """
    from wsi.slide import open_slide

    with open_slide(slide, reader, mpp=slide_mpp) as opened:
        width, height = opened.size
        facts: dict[str, Any] = {
            "slide": opened.path,
            "reader": opened.reader,
            "vendor": opened.vendor,
            "size_px": [width, height],
            "size_mm": [round(width * opened.mpp.x / 1000, 3), round(height * opened.mpp.y / 1000, 3)],
            "mpp": [opened.mpp.x, opened.mpp.y],
            "mpp_source": opened.mpp_source,
            "bounds_px": list(opened.bounds),
            "levels": [{"size_px": [w, h], "mpp": round(width / w * opened.mpp.x, 4)} for w, h in opened.level_sizes],
        }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(f"{facts['slide']}")
    print(f"  reader   {facts['reader']} ({facts['vendor']})")
    print(f"  size     {width} x {height} px, {facts['size_mm'][0]:g} x {facts['size_mm'][1]:g} mm")
    print(f"  mpp      {facts['mpp'][0]:.4g} x {facts['mpp'][1]:.4g} um per pixel, from {facts['mpp_source']}")
    print("  bounds   x {:g}, y {:g}, {:g} x {:g} px".format(*facts["bounds_px"]))
    for i, level in enumerate(facts["levels"]):
        print(f"  level {i}  {level['size_px'][0]} x {level['size_px'][1]} px at {level['mpp']:g} mpp")
