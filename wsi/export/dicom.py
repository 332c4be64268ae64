"""DICOM export of slides that are DICOM themselves (extra ``dicom``): tiles as annotations, the heatmap as an image.

- Microscopy Bulk Simple Annotations (1.2.840.10008.5.1.4.1.1.91.1): a group per class, a rectangle per tile with its
  measurements. Coordinates are those of the slide's total pixel matrix, top left corner (0, 0), which are our level-0
  pixels. Regions are not written: this object cannot hold their holes.
- Parametric Map (1.2.840.10008.5.1.4.1.1.30): the probability of the heatmap, float32, a pixel per grid step, NaN where
  there is no tile; in the slide's frame of reference, so that viewers overlay it on the slide.

Patient and study are copied from the slide, as DICOM requires: the files are as confidential as the slide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi import __version__
from wsi.errors import ResultsError
from wsi.export.objects import measurements
from wsi.export.rasters import slide_raster
from wsi.files import replacing
from wsi.result import called
from wsi.scored import ScoredSlide, ScoredTiles, scored_slides

_INSTALL = "Install it: pip install 'wsi[dicom]'"
#: Our own coding scheme: the classes of models are not in DICOM's dictionary.
_SCHEME = "99WSI"
_LONGEST_CODE = 16
_TILE_PX = 256


def export_dicom(results: Path, out: Path) -> list[dict[str, Any]]:
    """Write ``<slide>.ann.dcm`` and ``<slide>.heatmap.dcm`` for each slide of a results folder that is DICOM.

    Returns
    -------
    list of dict
        A row per slide: ``slide_id``, ``tiles``, ``warnings``. Slides that are not DICOM get a warning and no files.

    Raises
    ------
    ResultsError
        There are no results, a slide is no longer where it was scored, or highdicom is not installed.
    OSError
        `out` cannot be written to.

    Examples
    --------
    >>> export_dicom(Path("results"), Path("dicom"))                                      # doctest: +SKIP
    [{'slide_id': 'slide_1', 'tiles': 13816, 'warnings': []}]
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise ResultsError("wsi export dicom", f"needs highdicom ({error})", _INSTALL) from None
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for slide in scored_slides(results).values():
        tiles = slide.tiles(slide.store())
        source = _image_of(Path(str(slide.numbers["slide"])), slide)
        if source is None or not len(tiles.rows):
            why = "no tile was scored" if source is not None else "is no DICOM: its annotations would refer to nothing"
            rows.append({"slide_id": slide.slide_id, "tiles": 0, "warnings": [why]})
            continue
        try:
            objects = {"ann": _annotations(slide, tiles, source)}
            if slide.positive.any():
                objects["heatmap"] = _heatmap(slide, source)
        except AttributeError as error:  # highdicom copies attributes that the standard requires
            why = f"its header lacks what DICOM asks for ({error})"
            rows.append({"slide_id": slide.slide_id, "tiles": 0, "warnings": [why]})
            continue
        for kind, each in objects.items():
            with replacing(out / f"{slide.slide_id}.{kind}.dcm") as file:
                each.save_as(file)
        rows.append({"slide_id": slide.slide_id, "tiles": len(tiles.rows), "warnings": []})
    return rows


def _image_of(path: Path, slide: ScoredSlide) -> Any:
    """Return the level-0 image of the slide's series, without its pixels; None if the slide is not DICOM."""
    import pydicom

    if not path.is_file():
        raise ResultsError(path, "is not there any more", "Put the slide back where it was scored")
    if not pydicom.misc.is_dicom(path):
        return None
    series = str(pydicom.dcmread(path, stop_before_pixels=True).SeriesInstanceUID)
    for each in sorted(path.parent.iterdir()):
        if each.is_file() and pydicom.misc.is_dicom(each):
            image = pydicom.dcmread(each, stop_before_pixels=True)
            size = image.get("TotalPixelMatrixColumns"), image.get("TotalPixelMatrixRows")
            if image.get("SeriesInstanceUID") == series and size == slide.size:
                return image
    raise ResultsError(path, f"has no image of {slide.size[0]} x {slide.size[1]} px in its series", "Is it whole?")


def _annotations(slide: ScoredSlide, tiles: ScoredTiles, source: Any) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    names = called(tiles.probabilities, slide.positive, float(slide.numbers["threshold"]))
    x, y, w, h = tiles.grid.boxes().T
    corners = np.stack([np.stack([x, x + w, x + w, x], 1), np.stack([y, y, y + h, y + h], 1)], 2).astype(np.float32)
    values = measurements(slide, tiles)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=_made_by(slide)["manufacturer_model_name"], family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    groups: list[Any] = []
    for k, name in enumerate(slide.class_names):
        chosen = np.flatnonzero(names == k)
        if not len(chosen):
            continue
        groups.append(
            highdicom.ann.AnnotationGroup(
                number=len(groups) + 1,
                uid=_uid(slide, f"group/{name}"),
                label=name[:64],
                annotated_property_category=codes.SCT.MorphologicallyAbnormalStructure,
                annotated_property_type=_concept(name),
                graphic_type=highdicom.ann.GraphicTypeValues.RECTANGLE,
                graphic_data=list(corners[chosen]),
                algorithm_type=highdicom.ann.AnnotationGroupGenerationTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                measurements=_measurements(values, chosen),
            )
        )
    return highdicom.ann.MicroscopyBulkSimpleAnnotations(
        source_images=[source],
        annotation_coordinate_type=highdicom.ann.AnnotationCoordinateTypeValues.SCOORD,
        annotation_groups=groups,
        series_instance_uid=_uid(slide, "series"),
        series_number=1,
        sop_instance_uid=_uid(slide, "annotations"),
        **_made_by(slide),
    )


def _heatmap(slide: ScoredSlide, source: Any) -> Any:
    """DICOM's image position is the centre of the first pixel, here half a step from the slide's corner."""
    import highdicom
    from pydicom.sr.codedict import codes

    raster = slide_raster(slide)
    column, row = raster.step
    measures = source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    down, right = (float(mm) for mm in measures.PixelSpacing)
    to_slide = highdicom.spatial.ImageToReferenceTransformer.for_image(source, for_total_pixel_matrix=True)
    first = to_slide(np.array([[column / 2, row / 2]]))[0].tolist()
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label="probability",
        lut_explanation=f"probability of {raster.channels[0]}"[:64],
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, 1.0),
        slope=1.0,
        intercept=0.0,
        quantity_definition=_concept("probability"),
    )
    return highdicom.pm.ParametricMap(
        source_images=[source],
        pixel_array=raster.values[0][None, :, :, None],
        series_instance_uid=_uid(slide, "heatmap series"),
        series_number=2,
        sop_instance_uid=_uid(slide, "heatmap"),
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[[mapping]],
        voi_lut_transformations=[highdicom.VOILUTTransformation(window_center=0.5, window_width=1.0)],
        pixel_measures=highdicom.PixelMeasuresSequence(
            pixel_spacing=(down * row, right * column), slice_thickness=float(measures.SliceThickness)
        ),
        plane_orientation=highdicom.PlaneOrientationSequence("SLIDE", list(map(float, source.ImageOrientationSlide))),
        plane_positions=[highdicom.PlanePositionSequence("SLIDE", first, (1, 1))],
        tile_pixel_array=True,
        tile_size=(_TILE_PX, _TILE_PX),
        **_made_by(slide),
    )


def _made_by(slide: ScoredSlide) -> dict[str, Any]:
    """The attributes that both objects share."""
    return {
        "instance_number": 1,
        "manufacturer": "wsi",
        "manufacturer_model_name": str(slide.numbers.get("provenance", {}).get("model", "unknown"))[:64],
        "software_versions": __version__,
        "device_serial_number": "0",
        "content_description": "Research use only",
    }


def _measurements(values: dict[str, npt.NDArray[Any]], chosen: npt.NDArray[np.intp]) -> Sequence[Any]:
    import highdicom
    from pydicom.sr.codedict import codes

    units = {"attention_percentile": codes.UCUM.Percent}
    return [
        highdicom.ann.Measurements(_concept(name), each[chosen].astype(np.float32), units.get(name, codes.UCUM.NoUnits))
        for name, each in values.items()
    ]


def _concept(name: str) -> Any:
    """A concept whose code has at most 16 characters, as DICOM requires; longer names end in a part of their hash."""
    import highdicom

    short = name if len(name) <= _LONGEST_CODE else f"{name[:10]}~{hashlib.sha256(name.encode()).hexdigest()[:5]}"
    return highdicom.sr.CodedConcept(value=short, scheme_designator=_SCHEME, meaning=name[:64])


def _uid(slide: ScoredSlide, what: str) -> str:
    """A deterministic UID under 2.25 (UUID-derived; PS3.5 B.2)."""
    digest = hashlib.sha256(f"wsi:{slide.slide_id}/{slide.numbers['slide']}/{what}".encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big') >> 2}"
