"""Which slides are meant: folders with links and what is hidden, and slides that are named twice."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from wsi.archive import SlideRef, find_slides
from wsi.errors import ManifestError, SlideNotFound


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_links_are_followed_once_and_what_is_hidden_is_not_looked_into(tmp_path: Path) -> None:
    touch(tmp_path / "archive", "b.svs", "sub/a.svs", ".Trash/c.svs", "._b.svs", "sub/notes.txt", "lost+found/d.svs")
    touch(tmp_path / "mount", "e.svs")
    (tmp_path / "archive/other").symlink_to(tmp_path / "mount")
    (tmp_path / "archive/sub/up").symlink_to(tmp_path / "archive")
    (tmp_path / "archive/loop.svs").symlink_to("loop.svs")
    (tmp_path / "archive/again.svs").symlink_to("b.svs")
    found = [Path(ref.path).relative_to(tmp_path).as_posix() for ref in find_slides([str(tmp_path / "archive")])]
    assert found == ["archive/again.svs", "archive/other/e.svs", "archive/sub/a.svs"]


def test_a_results_folder_among_slides_holds_none(tmp_path: Path) -> None:
    """Heatmaps that were exported into it look like slides."""
    touch(tmp_path, "a.svs", "results/run.json", "results/slides.csv", "results/heatmaps/a.ome.tiff")
    assert [ref.path for ref in find_slides([str(tmp_path)])] == [str(tmp_path / "a.svs")]


def test_a_folder_that_cannot_be_looked_into_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.svs", "secret/b.svs")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(SlideNotFound, match=r"secret: cannot be searched \(Permission denied\)"):
        find_slides([str(tmp_path)])


def test_a_slide_that_is_named_twice_keeps_all_that_is_said_of_it(tmp_path: Path) -> None:
    touch(tmp_path, "s/a.svs", "m.png")
    (tmp_path / "list.csv").write_text("slide,mpp,mask,label,patient\ns/a.svs,0.25,m.png,tumour,P7\n")
    whole = SlideRef(str(tmp_path / "s/a.svs"), 0.25, "manifest", str(tmp_path / "m.png"), "tumour", "P7")
    folder, manifest = str(tmp_path / "s"), str(tmp_path / "list.csv")
    assert find_slides([folder, manifest]) == [whole] == find_slides([manifest, folder])
    for column, other in (("mpp", "0.5"), ("label", "normal"), ("patient", "P8")):
        (tmp_path / "other.csv").write_text(f"slide,{column}\ns/a.svs,{other}\n")
        with pytest.raises(ManifestError, match=f"named twice, with {column} "):
            find_slides([manifest, str(tmp_path / "other.csv")])


def test_manifests_as_spreadsheets_write_them(tmp_path: Path) -> None:
    touch(tmp_path, "a,1.svs", "b\n2.svs", "\u00e9.svs")
    text = '\ufeffSlide , Label,other\r\n"a,1.svs", x ,\r\n\r\n"b\n2.svs",y\r\n\u00e9.svs,z,1,2\r\n'
    (tmp_path / "list.csv").write_bytes(text.encode())
    refs = find_slides([str(tmp_path / "list.csv")])
    assert [(Path(ref.path).name, ref.label) for ref in refs] == [
        ("a,1.svs", "x"),
        ("b\n2.svs", "y"),
        ("\u00e9.svs", "z"),
    ]


def test_all_wrong_rows_of_a_manifest_are_told_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    manifest = tmp_path / "list.csv"
    manifest.write_text("slide,mpp\na.svs,\nb.svs,\na.svs,fine\n,0.5\n")
    with pytest.raises(ManifestError) as caught:
        find_slides([str(manifest)])
    head, *told = str(caught.value).splitlines()
    assert head == f"{manifest}: 3 of its rows are wrong:"
    assert told == [
        f"  line 3: there is no slide {tmp_path / 'b.svs'}. Paths are relative to the manifest",
        "  line 4: mpp is 'fine', not a number above 0. Microns per pixel, such as 0.25",
        "  line 5: names no slide. Fill in the column 'slide'",
    ]
    manifest.write_text("slide\n" + "b.svs\n" * 21)
    with pytest.raises(ManifestError) as caught:
        find_slides([str(manifest)])
    told = str(caught.value).splitlines()
    assert len(told) == 22 and told[-2].startswith("  line 21: ") and told[-1] == "  and 1 more"


def dicom(series: str, image_type: str, columns: int, rows: int, *, implicit: bool = False) -> bytes:
    """The few elements of DICOM PS3.5 that tell instances of a series apart, little endian."""
    said = b""
    for group, element, kind, value in (
        (0x0008, 0x0008, b"CS", image_type.encode()),
        (0x0020, 0x000E, b"UI", series.encode()),
        (0x0048, 0x0006, b"UL", struct.pack("<I", columns)),
        (0x0048, 0x0007, b"UL", struct.pack("<I", rows)),
    ):
        value += b"\0" * (len(value) % 2)
        length = struct.pack("<I", len(value)) if implicit else kind + struct.pack("<H", len(value))
        said += struct.pack("<HH", group, element) + length + value
    return bytes(128) + b"DICM" + said


@pytest.mark.parametrize("implicit", [False, True])
def test_a_dicom_series_is_named_by_its_finest_level(tmp_path: Path, implicit: bool) -> None:
    for name, kind, columns, rows in (
        ("1", "LABEL", 9000, 9000), ("2", "VOLUME", 1024, 512), ("3", "VOLUME", 4096, 2048),
        ("4", "VOLUME", 4096, 2048), ("5", "THUMBNAIL", 512, 256),
    ):  # fmt: skip
        head = dicom("1.2.3", f"ORIGINAL\\PRIMARY\\{kind}\\NONE", columns, rows, implicit=implicit)
        (tmp_path / f"{name}.dcm").write_bytes(head)
    (tmp_path / "6.dcm").write_bytes(dicom("1.2.4", "ORIGINAL\\PRIMARY\\OVERVIEW", 64, 64, implicit=implicit))
    (tmp_path / "35.svs").write_text("")
    before = [Path(ref.path).name for ref in find_slides([str(tmp_path)])]
    assert before == ["3.dcm", "35.svs", "6.dcm"]
    for name in "15":
        (tmp_path / f"{name}.dcm").unlink()
    assert [Path(ref.path).name for ref in find_slides([str(tmp_path)])] == before


def test_a_real_dicom_series_is_not_named_by_its_label(data_dir: Path) -> None:
    import openslide

    (ref,) = find_slides([str(data_dir / "wsi/dicom_cmu1_small_region")])
    with openslide.OpenSlide(ref.path) as slide:
        assert Path(ref.path).stat().st_size == max(path.stat().st_size for path in Path(ref.path).parent.iterdir())
        assert slide.dimensions == (2220, 2967)
