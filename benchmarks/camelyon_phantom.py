"""A phantom CAMELYON: slides whose lesions are known to the pixel, in the files of the real one.

    python benchmarks/camelyon_phantom.py FOLDER            write the slides, ASAP XML, reference.csv, stages.csv
    python benchmarks/camelyon_phantom.py FOLDER --check    say whether wsi evaluate found what is there; exit 1 if not

`make camelyon-phantom` does both, and in between scores, trains and evaluates by the commands alone. 20 training and 20
test slides of 6.1 mm at 1 um a pixel: half of them normal, the others with macro- and micrometastases and isolated
tumour cells. Lengths keep away from the limits of 0.2 and 2 mm. Test slides are five nodes of four patients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import shapely

from wsi.heatmap import major_axis_um
from wsi.metrics.kappa import node_stage, patient_stage
from wsi.phantom import PhantomConfig, write_phantom
from wsi.units import Mpp

SIZE, MPP = (6144, 6144), 1.0
PARTS = {"train": range(7000, 7020), "test": range(8000, 8020)}
#: What each slide of a part holds: nothing, micrometastases (m), or a macrometastasis too (M); five nodes a patient:
#: pN0, pN1mi, pN1, pN2.
PLAN = "..... m..m. Mm..M MmMmM".replace(" ", "")


def lengths(seed: int, kind: str) -> tuple[float, ...]:
    """Lengths of a slide's tumours in microns."""
    rng = np.random.default_rng(seed)
    if kind == ".":
        return ()
    macro = (float(rng.uniform(2250, 2500)),) if kind == "M" else ()
    micro = tuple(rng.uniform(450, 1200, rng.integers(1, 3)).tolist())
    return (*macro, *micro, float(rng.uniform(130, 165)))


def asap_xml(outlines: list[shapely.Polygon]) -> str:
    """Write outlines in the manner of ASAP, group Tumor."""
    shapes = []
    for i, outline in enumerate(outlines):
        points = "".join(
            f'<Coordinate Order="{n}" X="{x:.2f}" Y="{y:.2f}"/>'
            for n, (x, y) in enumerate(outline.exterior.coords[:-1])
        )
        shapes.append(
            f'<Annotation Name="Annotation {i}" Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58">'
            f"<Coordinates>{points}</Coordinates></Annotation>"
        )
    groups = '<AnnotationGroups><Group Name="Tumor" PartOfGroup="None" Color="#F4FA58"/></AnnotationGroups>'
    return f"<ASAP_Annotations><Annotations>{''.join(shapes)}</Annotations>{groups}</ASAP_Annotations>"


def write(folder: Path) -> None:
    """Write both parts; slides that are there stay."""
    for part, seeds in PARTS.items():
        for name in ("slides", "annotations"):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
        reference, stages = [], {}
        for i, seed in enumerate(seeds):
            slide_id = f"{part}_{i + 1:03}" if part == "train" else f"patient_{i // 5:03}_node_{i % 5}"
            slide = folder / part / "slides" / f"{slide_id}.tif"
            config = PhantomConfig(size=SIZE, mpp=MPP, seed=seed, tumours=0, tumour_um=lengths(seed, PLAN[i]))
            known = slide.with_suffix(".axes.json")
            if not known.exists():
                tumours = list(write_phantom(slide, config).tumours.geoms)
                if tumours:
                    (folder / part / "annotations" / f"{slide_id}.xml").write_text(asap_xml(tumours))
                known.write_text(json.dumps([major_axis_um(each, Mpp(MPP, MPP)) / 1000 for each in tumours]))
            stage = node_stage(max(json.loads(known.read_text()), default=0.0))
            stages[slide_id] = stage
            label = "Normal" if stage == "negative" else "Tumor"
            reference.append(f"{slide_id},{label},phantom,{'None' if label == 'Normal' else stage.capitalize()}\n")
            print(slide, stage, flush=True)
        (folder / part / "reference.csv").write_text("".join(reference))
        if part == "test":
            rows = ["patient,stage\n"]
            for patient in sorted({slide_id[:11] for slide_id in stages}):
                nodes = {name: stage for name, stage in stages.items() if name.startswith(patient)}
                rows.append(f"{patient}.zip,{patient_stage(list(nodes.values()))}\n")
                rows += [f"{name}.tif,{stage}\n" for name, stage in nodes.items()]
            (folder / part / "stages.csv").write_text("".join(rows))


def check(folder: Path) -> bool:
    """Whether FROC is at least 0.9 and every slide score's AUROC at least 0.95."""
    results = json.loads((folder / "camelyon16" / "report.json").read_text())["results"]
    stages = json.loads((folder / "camelyon17" / "report.json").read_text())["results"]
    limits = {"froc": 0.9, "auroc_max_probability": 0.95, "auroc_mil": 0.95, "auroc_random_forest": 0.95}
    good = True
    for name, limit in limits.items():
        value = results[name]["value"]
        fine = value is not None and value >= limit
        good &= fine
        print(f"{name:24} {value} (at least {limit}) {'ok' if fine else 'NOT MET'}")
    print(f"{'kappa':24} {stages['kappa']['value']} (for information: four patients)")
    return good


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not arguments.check:
        write(arguments.folder)
    elif not check(arguments.folder):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
