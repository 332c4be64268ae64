"""Tables as people and programs leave them: what is mended, and what is refused because nobody knows what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from wsi.errors import TrainError
from wsi.train.table import refuse_alike, rows_of


def test_rows_have_their_line_and_no_blanks(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffslide, patient ,,\n\n a ,"p, of\nq"\n,,\nb\n', encoding="utf-8")
    empty = {"": ""}
    assert rows_of(path, "slide") == [
        (4, {"slide": "a", "patient": "p, of\nq"} | empty), (6, {"slide": "b", "patient": ""} | empty)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slide,label\na,0\nb,1,2\n", "line 3 has 3 cells, the header 2"),
        ("slide,label,label\na,0,1\n", "has the column label twice"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TrainError, match=says):
        rows_of(tmp_path / "t.csv", "slide")


@pytest.mark.parametrize("names", [("P1", "p1"), ("P 1", "P1"), ("7", "07"), ("7", "7.0"), ("a", "b", "A ")])
def test_names_that_may_be_one_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(TrainError, match=f"patients .*{names[0]}.* in case, blanks or zeros alone"):
        refuse_alike(Path("t.csv"), "patients", names)


def test_names_that_are_several_are_not() -> None:
    """Numbers are compared exactly: as floats these two would be one."""
    refuse_alike(Path("t.csv"), "patients", ["12345678901234567", "12345678901234568", "P1", "P10", "1a", "10", "1.5"])
