"""Our files as the libraries that QuPath is made of read them: Gson, JTS and Groovy itself.

QuPath's readers were measured; ``jvm/PathIO.java`` refuses what they do, by means of the same libraries.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from tests.export.make import marked_results
from tests.test_check import BAD, GOOD, geojson, polygon, with_
from wsi.annotations import Annotation, read_annotations
from wsi.annotations.convert import write_annotations
from wsi.export.project import QuPathConfig, export_qupath
from wsi.export.rules import problems
from wsi.units import Box

JVM = Path(__file__).with_name("jvm")
#: Debian's libgoogle-gson-java and libjts-java, in the tree that its Java is of.
JARS = [
    Path(shutil.which("java") or "bin/java").parents[1] / "share/java" / name for name in ("gson.jar", "jts-core.jar")
]


@pytest.fixture(scope="module")
def classpath(tmp_path_factory: pytest.TempPathFactory) -> str:
    missing = [name for name in ("java", "javac") if not shutil.which(name)] + [j.name for j in JARS if not j.exists()]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (a JDK, libgoogle-gson-java, libjts-java)")
    folder = tmp_path_factory.mktemp("classes")
    path = os.pathsep.join(map(str, [*JARS, folder]))
    subprocess.run(["javac", "-cp", path, "-d", folder, JVM / "PathIO.java"], check=True)
    return path


def java_reads(classpath: str, *files: Path) -> list[dict[str, Any]]:
    """Of each file its objects, or why it is refused."""
    command = ["java", "-cp", classpath, "qupath.lib.io.PathIO", *files]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    assert len(lines) == len(files)
    return [json.loads(line) for line in lines]


def test_it_reads_what_we_export(tmp_path: Path, classpath: str):
    for name, config in {
        "tiles": QuPathConfig(),
        "shards": QuPathConfig(max_tiles=100, crop=False),
        "annotations": QuPathConfig(object_type="annotation", threshold=0.1, simplify_um=4),
    }.items():
        marked_results(tmp_path / name, mpp=0.2431, stride_px=48, bounds=Box(700, 300.5, 2000, 1600))
        (row,) = export_qupath(tmp_path / name, tmp_path / name / "out", config)
        files = sorted((tmp_path / name / "out/objects/a").iterdir())
        found = [each for read in java_reads(classpath, *files) for each in read["objects"]]
        assert len(found) == row["tiles"] + row["regions"] == len({each["id"] for each in found})
        ours = [each for file in files for each in json.loads(gzip.decompress(file.read_bytes()))["features"]]
        for one, other in zip(ours, found, strict=True):
            shape, properties = shapely.geometry.shape(one["geometry"]), one["properties"]
            assert one["id"] == other["id"] and properties["objectType"] == other["type"]
            read = shapely.from_wkt(other["wkt"])
            assert shapely.equals_exact(read.normalize(), shape.normalize(), 1e-9), "moved by the grid of a hundredth"
            assert properties["classification"] == {"name": other["className"], "color": other["color"]}
            assert properties["measurements"] == other["measurements"]


def test_it_reads_what_we_make_of_hostile_outlines(tmp_path: Path, classpath: str):
    rng = np.random.default_rng(0)
    given = [shapely.Polygon(rng.integers(0, 60, (rng.integers(4, 25), 2)) / 7) for _ in range(150)]
    given += [shapely.Polygon(p.exterior, [(rng.normal(4, 3, (4, 2)))]) for p in given[:40]]
    n = write_annotations(tmp_path / "a.geojson", [Annotation(p, "tumour") for p in given], slide_id="s")
    (read,) = java_reads(classpath, tmp_path / "a.geojson")
    assert len(read["objects"]) == n > 120
    assert problems(tmp_path / "a.geojson") == []


def test_it_reads_what_we_make_of_real_annotations(data_dir: Path, tmp_path: Path, classpath: str):
    made = []
    for path in sorted((data_dir / "annotations").rglob("*")):
        if path.suffix not in (".xml", ".geojson"):
            continue
        read = read_annotations(path)
        made.append((tmp_path / f"{len(made)}.geojson.gz", read))
        write_annotations(made[-1][0], read, slide_id=path.stem)
    assert len(made) > 5
    for (file, given), found in zip(made, java_reads(classpath, *(file for file, _ in made)), strict=True):
        assert problems(file) == [] and "refused" not in found
        whole = [shapely.make_valid(each.geometry).area for each in given]
        assert sum(each["area"] for each in found["objects"]) == pytest.approx(sum(whole), rel=2e-3, abs=1)


def test_what_it_refuses_we_tell(tmp_path: Path, classpath: str):
    """``wsi check`` against Java, on what QuPath was seen to refuse, and on rings of a few points anywhere."""
    rng = np.random.default_rng(1)
    features = [feature for feature, _ in BAD]
    features += [with_(classification=c) for c in ("Tumor", None, {}, {"names": ["A", "B"], "color": [1, 2, 3]})]
    features += [with_(measurements=[{"name": "p", "value": value}]) for value in (0.5, None)]
    for i in range(300):
        points = rng.integers(0, 6, (rng.integers(3, 7), 2)).tolist()
        features.append(polygon(*points, *points[: i % 8 > 0]))
    files = [geojson(tmp_path / f"{i}.geojson", feature) for i, feature in enumerate(features)]
    minor = ("UUID", "becomes an annotation")  # QuPath makes something of it
    told = [[line for line in problems(file) if not any(word in line for word in minor)] for file in files]
    refused = [found.get("refused") for found in java_reads(classpath, *files)]
    assert [bool(each) for each in told] == [bool(each) for each in refused], (told, refused)
    assert 50 < sum(map(bool, refused)) < len(files) - 50
    whole = {"type": "FeatureCollection", "features": [GOOD, BAD[0][0]]}
    (tmp_path / "a.geojson").write_text(json.dumps(whole))
    assert "PathClass" in java_reads(classpath, tmp_path / "a.geojson")[0]["refused"], "one bad feature, and nothing"


@pytest.mark.skipif(not shutil.which("groovy"), reason="groovy is not installed")
def test_the_import_script_fills_the_project(tmp_path: Path, classpath: str):
    """Twice, since a second run replaces what the first put there; what a user drew stays."""
    rows = {}
    for name in ("a", "b c"):
        marked_results(tmp_path / "r", name)
    out = tmp_path / "r/qupath"
    rows = {row["slide_id"]: row for row in export_qupath(tmp_path / "r", out)}
    (tmp_path / "elsewhere").mkdir()
    for name in ("project.qpproj", "classifiers"):  # a project of the user's own, which is told the folder
        shutil.copy(out / name, tmp_path / "elsewhere") if name[0] == "p" else shutil.copytree(
            out / name, tmp_path / "elsewhere" / name
        )
    java = Path(shutil.which("java") or "").resolve().parents[1]
    script = out / "scripts/import_wsi.groovy"
    for project, more in ((out, []), (tmp_path / "elsewhere", [out])):
        command = ["groovy", "-cp", classpath, JVM / "run.groovy", project / "project.qpproj", script, *more]
        found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAVA_HOME": str(java)})
        assert found.returncode == 0, found.stderr
        saved = json.loads(found.stdout.splitlines()[-1])
        assert saved == {name: [2, row["tiles"] + row["regions"] + 1] for name, row in rows.items()}
