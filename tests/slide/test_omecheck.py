"""OME-XML: what is refused by rule, and that tifffile takes little memory and time over the rest."""

from __future__ import annotations

import io
import logging
import tracemalloc
import warnings

import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slide.make import tiny_slides
from wsi.errors import SlideUnreadable
from wsi.slide.omecheck import check_ome

SLIDE = tiny_slides()["plain-deflate"]
PIXELS = {"DimensionOrder": "XYZCT", "SizeX": 40, "SizeY": 24, "SizeZ": 1, "SizeC": 3, "SizeT": 1, "Type": "uint8"}


def ome(inside: str = '<TiffData IFD="0"/>', annotations: str = "", head: str = "", **changed: object) -> str:
    attributes = " ".join(f'{name}="{value}"' for name, value in (PIXELS | changed).items())
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>{head}<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0"><Pixels ID="Pixels:0" {attributes}><Channel ID="Channel:0" SamplesPerPixel="3"/>{inside}'
        f"</Pixels></Image>{annotations}</OME>"
    )


def modulo(start: str, end: str, step: str = "1") -> str:
    along = f'<ModuloAlongZ Start="{start}" End="{end}" Step="{step}"/>'
    return (
        '<StructuredAnnotations><XMLAnnotation ID="A" Namespace="openmicroscopy.org/omero/dimension/modulo"><Value>'
        f"<Modulo>{along}</Modulo></Value></XMLAnnotation></StructuredAnnotations>"
    )


MANY = '<TiffData IFD="0" PlaneCount="30000"/>' * 3
DEFECTS = {
    "sections": (ome(SizeZ=21846), "of 6.55e\\+04 planes, more than 65536"),
    "all axes": (ome(SizeZ=1000, SizeC=1000, SizeT=1000), "of 1e\\+09 planes"),
    "negative": (ome(SizeZ=-1000, SizeC=-1000), "of 1e\\+06 planes"),
    "no end": (ome(SizeT="9" * 400), "of inf planes"),
    "more pixels than the page": (ome(SizeX=10**6, SizeY=10**6), "of 3.12e\\+09 planes"),
    "more pixels than the smallest page": (ome('<TiffData IFD="1"/>', SizeX=40_000), "of 2.88e\\+05 planes"),
    "more pixels than the last page": (ome('<TiffData IFD="-1"/>', SizeX=40_000), "of 2.88e\\+05 planes"),
    "a plane count": (ome('<TiffData IFD="0" PlaneCount="1000000000"/>'), "of 1e\\+09 planes"),
    "an old plane count": (ome('<TiffData IFD="0" NumPlanes="1000000000"/>'), "of 1e\\+09 planes"),
    "plane counts together": (ome(MANY), "of 9e\\+04 planes"),
    "all pages, over and over": (ome("<TiffData/>" * 40_000), "of 6.55e\\+04 planes"),
    "an axis twice": (ome(DimensionOrder="XYZZZZZZ"), "whose axes are 'XYZZZZZZ'"),
    "an axis of its own": (ome(DimensionOrder="XYZCTQ", SizeQ=10**9), "whose axes are 'XYZCTQ'"),
    "planes first": (ome(DimensionOrder="ZCTXY"), "whose axes are 'ZCTXY'"),
    "a long range": (ome(annotations=modulo("0", "1e12")), "of 1e\\+12 planes"),
    "a fine range": (ome(annotations=modulo("0", "1", "1e-9")), "of 1e\\+09 planes"),
    "an endless range": (ome(annotations=modulo("0", "1", "0")), "of inf planes"),
    "entities": (ome(head='<!DOCTYPE OME [<!ENTITY a "b">]>'), "with EntitiesForbidden"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named(name: str) -> None:
    text, message = DEFECTS[name]
    with pytest.raises(SlideUnreadable, match=f"^a.tif: has an OME-XML {message}"):
        check_ome(text.encode(), [960, 10, 0], "a.tif")


@pytest.mark.parametrize(
    "text",
    [
        ome(),
        ome(""),
        ome(SizeZ=300, SizeC=6, SizeT=10),
        ome(SizeC=40, DimensionOrder="XYCZT"),
        ome('<TiffData IFD="0" PlaneCount="2"/><TiffData IFD="1"/>'),
        ome("<TiffData/>"),
        ome(SizeX="many"),
        ome(SizeT="nan"),
        ome(annotations=modulo("0", "359", "0.5")),
        "<OME><Image",
        "Aperio OME>",
        "",
    ],
)
def test_what_is_usual_passes(text: str) -> None:
    check_ome(text.encode() + b"\0", [960, 960], "a.tif")


NUMBERS = st.sampled_from(["0", "1", "2", "3", "7", "40", "-1", "-3", "1000", "65536", "100000000", "x", "1_0"])


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries({}, optional={f"Size{axis}": NUMBERS for axis in "XYZCT"}),
    st.permutations("ZCT"),
    st.lists(
        st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("IFD", "PlaneCount", "NumPlanes", "FirstZ", "FirstC", "FirstT"), NUMBERS)
        ),
        max_size=3,
    ),
)
def test_tifffile_takes_little_memory_over_what_passes(
    sizes: dict[str, str], order: list[str], planes: list[dict[str, str]]
) -> None:
    inside = "".join("<TiffData " + " ".join(f"{k}='{v}'" for k, v in data.items()) + "/>" for data in planes)
    text = ome(inside, DimensionOrder="XY" + "".join(order), **sizes)
    try:
        check_ome(text.encode(), [40 * 24], "a.tif")
    except SlideUnreadable:
        return
    slide = io.BytesIO(SLIDE)
    logging.disable()
    tracemalloc.start()
    try:
        with tifffile.TiffFile(slide, omexml=text) as tiff, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert tiff.series is not None
    except (ValueError, IndexError, KeyError, RuntimeError, ZeroDivisionError):
        pass  # tifffile stumbles; readers say so
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    assert peak < 16 << 20
