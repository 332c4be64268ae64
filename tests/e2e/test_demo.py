"""The demo: a slide whose truth is known, scored by the model that ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import shapely

from wsi.cli import main
from wsi.export.geojson import read_geojson


def test_finds_the_tumours_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["wsi", "demo", "-o", str(tmp_path), "--size", "8192", "--seed", "5", "-q"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "3 of 3 tumours" in capsys.readouterr().out
    folder = tmp_path / "results/phantom-8192-5"
    assert json.loads((folder / "result.json").read_text())["grade"] == "tumour"
    truth, found = (
        shapely.union_all(
            [
                shapely.geometry.shape(feature["geometry"])
                for feature in read_geojson(path)
                if feature["properties"]["classification"]["name"] in ("Tumor", "tumour")
            ]
        )
        for path in (tmp_path / "phantom-8192-5.truth.geojson", folder / "regions.geojson")
    )

    def overlap(other: shapely.Geometry) -> float:
        return truth.intersection(other).area / truth.union(other).area

    # Tiles are 256 px wide, so outlines cannot be hit exactly, but nothing moved is hit better.
    assert overlap(found) > 0.75
    for dx, dy in ((256, 0), (-256, 0), (0, 256), (0, -256)):
        assert overlap(shapely.affinity.translate(found, dx, dy)) < overlap(found)
    assert overlap(shapely.transform(found, lambda xy: xy[:, ::-1])) < 0.5  # axes are not exchanged
