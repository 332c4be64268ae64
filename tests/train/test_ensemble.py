"""The model folder: whole, bound to its configuration, loadable, the same however often it was stopped."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.train.make import cohort_of, write_bags, write_labels
from wsi.cli import app
from wsi.errors import ConfigMismatch, TrainError, WsiError
from wsi.nn.grade import feature_shift, load_mil_model
from wsi.nn.uncertainty import prediction_set
from wsi.train.bags import find_bags, read_bag
from wsi.train.cohort import Case, Cohort, Split, k_fold, write_splits
from wsi.train.ensemble import _calibrate, train_mil
from wsi.train.mil import Bags, MilConfig

torch.set_num_threads(1)
LABELS = {f"s{i:02d}": i % 2 for i in range(30)}
CONFIG = MilConfig("gated-attention", {"hidden": 8}, epochs=12, lr=0.01)


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Bags:
    return Bags(find_bags([write_bags(tmp_path_factory.mktemp("bags"), LABELS, layout="store")]))


@pytest.fixture(scope="module")
def trained(bags: Bags, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "grader"
    cohort = cohort_of(LABELS, 15)
    train_mil(cohort, bags, k_fold(cohort, 3, 0), out, CONFIG, seeds=2, coverage=0.8)
    return out


def test_the_folder_is_a_model_with_its_papers(trained: Path, bags: Bags) -> None:
    model = load_mil_model(trained)
    assert model.config.members == 6 and model.config.encoder_sha256 == "a" * 64
    assert model.config.positive_classes == ("class 1",) and model.config.conformal_threshold is not None
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["test"]["pooled"]["auroc"] > 0.8 and figures["test"]["slides"] == 30
    assert figures["weights_sha256"] == model.sha256
    card = (trained / "CARD.md").read_text()
    assert model.sha256 in card and "Research use only" in card
    assert f"{figures['test']['pooled']['auroc']:.3f}" in card
    with (trained / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert {(row["fold"], row["seed"]) for row in log} == {(str(k), str(s)) for k in range(3) for s in range(2)}
    assert (trained / "log.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (trained / "splits").iterdir()) == [f"splits_{k}.csv" for k in range(3)]


def test_without_slides_the_stains_are_not_known_and_the_folder_says_why(trained: Path) -> None:
    said = json.loads((trained / "stain.json").read_text())
    assert said["limit"] is None and "names no slide" in said["reason"]
    assert "names no slide" in (trained / "CARD.md").read_text()


def test_predictions_are_those_of_members_that_never_saw_the_slide(trained: Path, bags: Bags) -> None:
    with (trained / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60 and {row["part"] for row in rows} == {"validation", "test"}
    splits = k_fold(cohort_of(LABELS, 15), 3, 0)
    model = load_mil_model(trained)
    for row in rows[::7]:
        k = int(row["fold"])
        assert row["slide"] not in splits[k].train
        members = model(bags[row["slide"]].features.numpy()).members[2 * k : 2 * k + 2]  # of the split, a seed each
        assert float(row["prob_class 1"]) == pytest.approx(members.mean(0)[1], abs=1e-5)


def test_a_cox_ensembles_risks_are_relative_to_each_members_own_baseline(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [f"s{i:02d}" for i in range(60)]
    bags = Bags(find_bags([write_bags(tmp_path / "bags", {i: 2 * (n % 2) for n, i in enumerate(ids)})]))
    cases = {}
    for n, i in enumerate(ids):
        time = float(rng.exponential(2 if n % 2 else 20))
        cases[i] = Case(i, i, int(np.searchsorted([2, 8], time)), time, bool(rng.random() < 0.8))
    cohort = Cohort(cases, ("0 to 2", "2 to 8", "after 8"), (2.0, 8.0))
    config = replace(CONFIG, head="cox", batch=16)
    train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path / "model", config, seeds=2)
    model = load_mil_model(tmp_path / "model")
    with (tmp_path / "model/predictions.csv").open() as file:
        for row in csv.DictReader(file):
            k, features = int(row["fold"]), bags[row["slide"]].features.numpy()
            own = model(features).members[2 * k : 2 * k + 2].mean(0)
            np.testing.assert_allclose(own, [float(row[f"prob_{name}"]) for name in cohort.class_names], atol=1e-5)


def test_training_slides_are_in_range_and_others_are_not(trained: Path, bags: Bags) -> None:
    model = load_mil_model(trained)
    for slide_id in LABELS:
        features = bags[slide_id].features.numpy()
        assert "outside the range" not in (model.doubts(model(features), features).abstain or "")
    features = features + np.float16(20)
    assert "outside the range" in (model.doubts(model(features), features).abstain or "")


def test_stopped_and_begun_again_it_gives_the_same_bytes(trained: Path, bags: Bags, tmp_path: Path) -> None:
    cohort, calls = cohort_of(LABELS, 15), 0

    def stop(member: str, epoch: int, of: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt

    arguments: dict[str, Any] = {"seeds": 2, "coverage": 0.8}
    with pytest.raises(KeyboardInterrupt):
        train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path, CONFIG, progress=stop, **arguments)
    assert not (tmp_path / "config.json").exists()
    train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path, CONFIG, **arguments)
    for name in ("weights.safetensors", "config.json", "figures.json", "log.csv", "predictions.csv", "log.png"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_folder_of_another_training_is_refused(trained: Path, bags: Bags) -> None:
    cohort = cohort_of(LABELS, 15)
    before = (trained / "config.json").read_bytes()
    with pytest.raises(ConfigMismatch, match="another config"):
        train_mil(cohort, bags, k_fold(cohort, 3, 0), trained, MilConfig(lr=1), seeds=2, coverage=0.8)
    with pytest.raises(ConfigMismatch, match="another splits"):
        train_mil(cohort, bags, k_fold(cohort, 3, 1), trained, CONFIG, seeds=2, coverage=0.8)
    assert (trained / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "config", "says"),
    [
        ({}, MilConfig(head="cox", batch=4), "does not fit the labels"),
        ({"positive": ["lymphoma"]}, MilConfig(), "no such class"),
        ({}, MilConfig(arguments={"wings": 2}), "arguments do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    bags: Bags, tmp_path: Path, arguments: dict[str, Any], config: MilConfig, says: str
) -> None:
    cohort = cohort_of(LABELS, 15)
    with pytest.raises(WsiError, match=says):
        train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path / "out", config, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_network_that_reads_places_is_refused_bags_without(tmp_path: Path) -> None:
    some = dict(list(LABELS.items())[:-1])
    write_bags(tmp_path / "h5", some)
    bags = Bags(find_bags([tmp_path / "h5", write_bags(tmp_path / "pt", {"s29": 1}, layout="pt")]))
    cohort = cohort_of(LABELS)
    with pytest.raises(TrainError, match=r"s29: .*no boxes"):
        train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path / "out", MilConfig("transmil"))
    assert not (tmp_path / "out").exists()


def test_a_slide_under_two_names_is_refused_but_of_one_patient(tmp_path: Path) -> None:
    folder = write_bags(tmp_path / "bags", LABELS) / "h5_files"
    shutil.copy(folder / "s04.h5", folder / "s30.h5")
    bags, labels = Bags(find_bags([folder])), LABELS | {"s30": 0}
    for patients, says in ((0, "s04 of patient p4 has the very features of s30, of p30"), (26, "arguments do not fit")):
        cohort = cohort_of(labels, patients)
        with pytest.raises(WsiError, match=says):
            train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path / "out", MilConfig(arguments={"wings": 2}))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bags]:
    """A model of classes that nobody could mistake."""
    folder = tmp_path_factory.mktemp("parted")
    bags = Bags(find_bags([write_bags(folder / "bags", {i: 3.0 * y for i, y in LABELS.items()})]))
    cohort = cohort_of(LABELS)
    config = replace(CONFIG, architecture="max", epochs=40)
    train_mil(cohort, bags, k_fold(cohort, 3, 0), folder / "model", config, coverage=0.8)
    return folder / "model", bags


def test_of_thirty_slides_that_are_all_right_no_certainty_is_claimed(parted: tuple[Path, Bags]) -> None:
    """One more wrong than right of 31: Laplace's rule of succession."""
    figures = json.loads((parted[0] / "figures.json").read_text())
    assert figures["test"]["pooled"]["accuracy"] == 1
    with (parted[0] / "predictions.csv").open() as file:
        own = [float(row[f"prob_{row['label']}"]) for row in csv.DictReader(file)]
    assert 0.9 < np.mean(own) < 0.99


def test_what_is_rounded_keeps_the_slides_it_was_taken_from(parted: tuple[Path, Bags]) -> None:
    model, bags = load_mil_model(parted[0]), parted[1]
    farthest = max(feature_shift(model._nets[0], bags[i].features) for i in LABELS)
    assert model.config.largest_shift is not None
    assert farthest < model.config.largest_shift == pytest.approx(farthest, rel=2e-5)


def test_a_threshold_of_sets_is_never_rounded_up() -> None:
    """All that are surer than 0.9999997 would be left with no class."""
    cohort = cohort_of(LABELS)
    p = np.array([3e-7, 1 - 3e-7])
    rows = [
        {"case": case, "part": "validation", "probabilities": p if case.label else p[::-1]}
        for case in cohort.cases.values()
    ]
    found = _calibrate(cohort, rows, (), 0.9)["conformal_threshold"]
    assert found == 0.999999 and prediction_set(p, found) == [1]


class TestCommand:
    def run(self, *words: object) -> Any:
        return CliRunner().invoke(app, ["train", "mil", *map(str, words)])

    def test_from_a_folder_and_a_table_to_a_model(self, tmp_path: Path) -> None:
        folder = write_bags(tmp_path / "clam", LABELS)
        rows = [
            {"slide": f"{i}.svs", "case_id": i, "time": 9 - 8 * y + int(i[1:]) / 99, "event": 1}
            for i, y in LABELS.items()
        ]
        table = write_labels(tmp_path / "l.csv", rows)
        out = tmp_path / "out"
        done = self.run(
            folder, "--labels", table, "-o", out, "--time-bins", "2,5", "--epochs", 2, "--folds", 3, "-a", "mean",
            "--set", "hidden=4", "--json",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "concordance" in json.loads(done.stdout)["test"]["pooled"]
        model = load_mil_model(out)
        bag = read_bag(folder / "h5_files" / "s00.h5")
        assert model(bag.features, bag.boxes).probabilities.shape == (3,)
        splits = self.run(
            folder, "--labels", table, "-o", tmp_path / "again", "--time-bins", "2,5", "--epochs", 2, "-a", "mean",
            "--set", "hidden=4", "--splits", out / "splits", "-q",
        )  # fmt: skip
        assert splits.exit_code == 0 and "in no split" not in splits.output
        assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()

    def test_grades_in_words_are_asked_for_their_order(self, tmp_path: Path) -> None:
        """By alphabet high would come before low."""
        folder = write_bags(tmp_path / "clam", LABELS)
        rows = [{"slide": i, "label": ("low", "mid", "high")[int(i[1:]) % 3]} for i in LABELS]
        words = (folder, "--labels", write_labels(tmp_path / "l.csv", rows), "--head", "ordinal", "--epochs", 1)
        done = self.run(*words, "-o", tmp_path / "out")
        assert isinstance(done.exception, WsiError) and "--classes, the least first" in str(done.exception)
        assert self.run(*words, "-o", tmp_path / "out", "--classes", "low,mid,high").exit_code == 0
        assert load_mil_model(tmp_path / "out").config.class_names == ("low", "mid", "high")

    def test_slides_in_no_split_are_said(self, tmp_path: Path) -> None:
        folder = write_bags(tmp_path / "clam", LABELS)
        table = write_labels(tmp_path / "l.csv", [{"slide": i, "label": y} for i, y in LABELS.items()])
        ids = list(LABELS)
        write_splits(tmp_path / "splits", [Split(tuple(ids[:20]), tuple(ids[20:28]), ())])
        words = ("--labels", table, "--splits", tmp_path / "splits", "--epochs", 1, "-o", tmp_path / "out")
        assert "2 slides are in no split, s28 for one" in self.run(folder, *words).output

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["-a", "perceptron"], "Known: mean"),
            (["--set", "hidden"], "not name=value"),
            (["--time-bins", "a,b"], "not numbers"),
            (["--folds", "31"], "there are 30 patients"),
            (["--label", "grade"], "Needed: slide, grade"),
        ],
    )
    def test_wrong_calls_say_what_to_do(self, tmp_path: Path, words: list[str], says: str) -> None:
        folder = write_bags(tmp_path / "clam", LABELS)
        table = write_labels(tmp_path / "l.csv", [{"slide": i, "label": y} for i, y in LABELS.items()])
        done = self.run(folder, "--labels", table, "-o", tmp_path / "out", *words)
        assert isinstance(done.exception, WsiError) and says in str(done.exception)
        assert not (tmp_path / "out").exists()
