"""The model folder: whole, bound to its configuration, loadable, the same however often it was stopped."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.train.make import cohort_of, write_bags, write_labels
from wsi.cli import app
from wsi.errors import ConfigMismatch, WsiError
from wsi.nn.grade import load_mil_model
from wsi.train.bags import find_bags, read_bag
from wsi.train.cohort import Case, Cohort, k_fold
from wsi.train.ensemble import train_mil
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
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    bags: Bags, tmp_path: Path, arguments: dict[str, Any], config: MilConfig, says: str
) -> None:
    cohort = cohort_of(LABELS, 15)
    with pytest.raises(WsiError, match=says):
        train_mil(cohort, bags, k_fold(cohort, 3, 0), tmp_path / "out", config, **arguments)
    assert not (tmp_path / "out").exists()


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
        assert splits.exit_code == 0
        assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()

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
