"""Which slides are meant: folders with links and what is hidden, and slides that are named twice."""

from __future__ import annotations

import errno
import os
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
