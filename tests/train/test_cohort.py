"""Labels and divisions: what is read, and what is refused because a figure would lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.make import cohort_of, write_labels
from wsi.errors import TrainError
from wsi.train.cohort import Split, check_split, k_fold, match, read_labels, read_patients, read_splits, write_splits

ROWS = [
    {"slide": "a.svs", "patient": "p", "label": "tumour", "time": "3", "event": "1"},
    {"slide": "b.svs", "patient": "q", "label": "normal", "time": "12.5", "event": "0"},
]


def test_labels_are_read_in_order(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "l.csv", ROWS)
    cohort = read_labels(path)
    assert cohort.class_names == ("normal", "tumour")
    assert [(c.slide_id, c.patient, c.label) for c in cohort.cases.values()] == [("a.svs", "p", 1), ("b.svs", "q", 0)]
    assert read_labels(path, classes=["tumour", "normal"]).cases["a.svs"].label == 0
    clam = [{"case_id": "p", "slide_id": str(i), "label": str(g)} for i, g in enumerate([10, 9, 2])]
    assert read_labels(write_labels(tmp_path / "c.csv", clam)).class_names == ("2", "9", "10")
    pandas = [row | {"label": f"{row['label']}.0"} for row in clam]
    assert read_labels(write_labels(tmp_path / "f.csv", pandas)).class_names == ("2.0", "9.0", "10.0")
    named = [ROWS[0] | {"label": "NA"}, ROWS[1]]
    assert read_labels(write_labels(tmp_path / "n.csv", named), classes=["normal", "NA"]).cases["a.svs"].label == 1


def test_survival_falls_into_intervals(tmp_path: Path) -> None:
    cohort = read_labels(write_labels(tmp_path / "l.csv", ROWS), time_bins=[3, 12])
    assert cohort.class_names == ("0 to 3", "3 to 12", "after 12") and cohort.time_bins == (3, 12)
    assert [(c.label, c.time, c.event) for c in cohort.cases.values()] == [(0, 3.0, True), (2, 12.5, False)]


@pytest.mark.parametrize(
    ("changes", "arguments", "says"),
    [
        ({"label": ""}, {}, "line 2: label is empty"),
        ({"patient": " "}, {}, "line 2: patient is empty"),
        ({"patient": "Q"}, {}, "patients 'Q' and 'q' differ in case"),
        ({"patient": "Q"}, {"time_bins": [5]}, "patients 'Q' and 'q' differ in case"),
        ({"patient": "NaN"}, {}, "line 2: patient is NaN"),
        ({"label": "NA"}, {}, "line 2: label is NA"),
        ({"label": "Normal"}, {}, "labels 'Normal' and 'normal' differ in case"),
        ({}, {"classes": ["tumour", "normal", "tumour"]}, "names a class twice"),
        ({"slide": "b.svs"}, {}, "slide b.svs is there twice"),
        ({"label": "normal"}, {}, "all have the label"),
        ({}, {"classes": ["normal", "other"]}, "label 'tumour' is not one of"),
        ({}, {"label": "grade"}, "Needed: slide, grade"),
        ({"time": "soon"}, {"time_bins": [5]}, "time 'soon'"),
        ({"event": "2"}, {"time_bins": [5]}, "event '2'"),
        ({"event": "0"}, {"time_bins": [5]}, "no slide has an event until 5"),
        ({}, {"time_bins": [5, 5]}, "do not rise"),
        ({}, {"time_bins": [5, float("inf")]}, "do not rise"),
        ({}, {"time_bins": [1, 2]}, "no slide has an event until 2"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, changes: dict[str, str], arguments: dict[str, Any], says: str) -> None:
    path = write_labels(tmp_path / "l.csv", [ROWS[0] | changes, ROWS[1]])
    with pytest.raises(TrainError, match=says):
        read_labels(path, **arguments)


def test_no_table(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(TrainError, match=r"columns \(none\)"):
        read_labels(tmp_path / "empty.csv")
    with pytest.raises(TrainError, match="cannot be read"):
        read_labels(tmp_path / "nowhere.csv")


def test_labels_and_bags_are_brought_together_or_it_is_said_what_is_missing(tmp_path: Path) -> None:
    cohort = read_labels(write_labels(tmp_path / "l.csv", ROWS))
    assert list(match(cohort, ["a", "b"]).cases) == ["a", "b"]
    with pytest.raises(TrainError, match="1 slides have a label and no bag: b"):
        match(cohort, ["a"])
    with pytest.raises(TrainError, match="1 slides have a bag and no label: c"):
        match(cohort, ["a", "b", "c"])
    assert list(match(cohort, ["a", "c"], subset=True).cases) == ["a"]
    with pytest.raises(TrainError, match="no slide has both"):
        match(cohort, ["c"], subset=True)
    twice = read_labels(write_labels(tmp_path / "t.csv", [*ROWS, ROWS[0] | {"slide": "a.tif"}]))
    with pytest.raises(TrainError, match="two rows mean the bag a"):
        match(twice, ["a", "b"])


@given(
    labels=st.lists(st.integers(0, 2), min_size=9, max_size=60), patients=st.integers(6, 40), folds=st.integers(3, 6),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_folds_keep_patients_together_and_use_every_slide_once(
    labels: list[int], patients: int, folds: int, seed: int
) -> None:
    cohort = cohort_of({f"s{i}": label for i, label in enumerate(labels)}, patients)
    splits = k_fold(cohort, folds, seed)
    assert sorted(i for split in splits for i in split.test) == sorted(cohort.cases)
    assert sorted(i for split in splits for i in split.validation) == sorted(cohort.cases)
    for split in splits:
        assert sorted(i for ids in split for i in ids) == sorted(cohort.cases)
        of = [{cohort.cases[i].patient for i in ids} for ids in split]
        assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])
    assert splits == k_fold(cohort, folds, seed)


def test_folds_are_stratified() -> None:
    cohort = cohort_of({f"s{i}": int(i < 10) for i in range(50)})
    for split in k_fold(cohort, 5, 0):
        assert sum(cohort.cases[i].label for i in split.test) == 2 and len(split.test) == 10
    assert k_fold(cohort, 5, 0) != k_fold(cohort, 5, 1)


def test_splits_survive_clams_format(tmp_path: Path) -> None:
    splits = k_fold(cohort_of({f"s{i}": i % 2 for i in range(33)}), 11, 0)
    write_splits(tmp_path, splits)
    (tmp_path / "splits_0_bool.csv").write_text("not this one")
    assert read_splits(tmp_path) == splits
    assert read_splits(tmp_path / "splits_10.csv") == splits[10:]
    assert (tmp_path / "splits_0.csv").read_text().splitlines()[0] == ",train,val,test"
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,1,3.0,4.0\n1,2,,a.svs\n")
    assert read_splits(tmp_path / "splits_0.csv", ["1", "2", "3", "4", "a"]) == [Split(("1", "2"), ("3",), ("4", "a"))]
    (tmp_path / "splits_0.csv").write_text(",train,val\n0,a,b\n")
    with pytest.raises(TrainError, match="lacks one of the columns"):
        read_splits(tmp_path)
    (tmp_path / "splits_0.csv").write_bytes(b"train,val,test\n\xff\xfe\n")
    with pytest.raises(TrainError, match="columns train, val, test"):
        read_splits(tmp_path)
    with pytest.raises(TrainError, match="holds no splits"):
        read_splits(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (Split(("s0", "s1"), ("s2", "s3"), ("s4", "s9")), "slide s9 has no label or no bag"),
        (Split(("s0", "s1"), ("s2", "s3"), ("s6",)), "patient p0 is in train and in test"),
        (Split(("s0", "s1"), ("s1", "s2"), ()), "patient p1 is in train and in validation"),
        (Split(("s0", "s1", "s0"), ("s2", "s3"), ()), "slide s0 is twice in train"),
        (Split(("s0", "s1"), (), ("s2",)), "its validation part is empty"),
        (Split(("s0", "s2"), ("s1", "s3"), ()), "its train part holds no 'class 1'"),
        (Split(("s0", "s1"), ("s2", "s4"), ()), "its validation part holds no 'class 1'"),
    ],
)
def test_divisions_that_leak_or_teach_nothing_are_refused(split: Split, says: str) -> None:
    cohort = cohort_of({f"s{i}": i % 2 for i in range(8)}, patients=6)
    check_split(cohort, Split(("s0", "s1"), ("s2", "s3"), ("s4", "s5")), "good")
    with pytest.raises(TrainError, match=says):
        check_split(cohort, split, "splits_0.csv")


def test_too_few_folds_or_patients() -> None:
    cohort = cohort_of({f"s{i}": i % 2 for i in range(20)}, patients=4)
    with pytest.raises(TrainError, match="at least 3"):
        k_fold(cohort, 2, 0)
    with pytest.raises(TrainError, match="there are 4 patients"):
        k_fold(cohort, 5, 0)


def test_a_slide_without_its_patient_is_named(tmp_path: Path) -> None:
    """An empty cell would make one patient of all slides that have none."""
    (tmp_path / "p.csv").write_text("slide,patient\na,p\nb,q\n")
    assert read_patients(tmp_path / "p.csv") == {"a": "p", "b": "q"}
    for row in ("c,", "c"):
        (tmp_path / "p.csv").write_text(f"slide,patient\na,p\n{row}\n")
        with pytest.raises(TrainError, match="line 3: patient is empty"):
            read_patients(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text("slide,patient\na,p\na,p\n")
    assert read_patients(tmp_path / "p.csv") == {"a": "p"}
    (tmp_path / "p.csv").write_text("slide,patient\na,p\nb,p\na,q\n")
    with pytest.raises(TrainError, match="line 4: slide a is of patient q, and of p"):
        read_patients(tmp_path / "p.csv")
