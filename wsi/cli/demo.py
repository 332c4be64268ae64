"""``wsi demo``: score a synthetic slide with known tumours, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wsi.cli.display import say, watching, writing


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the slide and the results.")] = Path("demo"),
    size: Annotated[int, typer.Option(min=4096, max=100_000, help="Side of the slide in pixels at 0.5 mpp.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the slide.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write a synthetic slide with known tumours, score it with an included model, and compare.

    Example:
      wsi demo -o demo
    """
    import sys

    import shapely

    from wsi.archive import SlideRef, default_threads, score_archive
    from wsi.engine import EngineConfig
    from wsi.export.geojson import read_geojson
    from wsi.phantom import PhantomConfig, write_phantom

    slide = out / f"phantom-{size}-{seed}.tif"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    truth = write_phantom(slide, PhantomConfig(size=(size, size), seed=seed))
    engine = EngineConfig("phantom", threads=default_threads())
    results = out / "results"
    with watching(1, quiet=quiet) as tell:
        summary = score_archive([SlideRef(str(slide))], results, engine, command=sys.argv, tell=tell)
    if summary.failed:
        say(f"wsi: {summary.failed[0]['error']}")
        raise typer.Exit(2)
    row = summary.done[0]
    folder = results / row["slide_id"]
    positive = [
        shapely.geometry.shape(feature["geometry"])
        for feature in read_geojson(folder / "regions.geojson")
        if feature["properties"]["classification"]["name"] == "tumour"
    ]
    found, known = shapely.union_all(positive), truth.tumours
    hit = sum(1 for tumour in known.geoms if tumour.intersects(found))
    overlap = found.intersection(known).area / max(found.union(known).area, 1)
    print(f"slide      {slide}")
    print(f"table      {results / 'slides.csv'}")
    print(f"GeoJSON    {folder / 'regions.geojson'}, {folder / 'tiles.geojson.gz'}")
    print(f"overlay    {folder / 'overlay.png'}")
    print(f"grade      {row['grade']} (the slide holds {len(known.geoms)} tumours)")
    print(f"found      {hit} of {len(known.geoms)} tumours; overlap with their true outlines (IoU) {overlap:.2f}")
    print("Synthetic tissue and a model trained on it: this shows that the software works, and nothing of medicine.")
