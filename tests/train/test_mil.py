"""Training of one network: it learns, it resumes to the byte, and chance comes from the seed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.nn.mil.make import ALL, SMALL
from tests.train.make import WIDTH, cohort_of, features_of, write_bags
from wsi.errors import ModelError, TrainError, WsiError
from wsi.nn.mil import TrainingBag
from wsi.train.bags import find_bags
from wsi.train.cohort import Case, Cohort, Split, k_fold
from wsi.train.mil import Bags, BagStats, Member, MilConfig, scale_of, train_member

torch.set_num_threads(1)  # tiny networks: a second thread only waits
LABELS = {f"s{i:02d}": i % 2 for i in range(24)}


@pytest.fixture(scope="module")
def bags(tmp_path_factory: pytest.TempPathFactory) -> Bags:
    return Bags(find_bags([write_bags(tmp_path_factory.mktemp("bags"), LABELS)]))


@pytest.fixture
def split() -> Split:
    return k_fold(cohort_of(LABELS), 4, 0)[0]


def weights(member: Member) -> list[np.ndarray]:
    return [value.numpy() for value in member.net.state_dict().values()]


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_learns(bags: Bags, split: Split, name: str) -> None:
    arguments = {"hidden": 8} | SMALL.get(name, {})
    config = MilConfig(name, arguments, epochs=30, lr=0.01, patience=None)
    member = train_member(cohort_of(LABELS), bags, split, config)
    assert member.history[-1]["train_loss"] < 0.75 * member.history[0]["train_loss"]
    assert set(member.logits) == {*split.validation, *split.test}


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(bags: Bags, split: Split) -> None:
    config = MilConfig("dtfd", {"hidden": 8}, epochs=3)
    one, two = (train_member(cohort_of(LABELS), bags, split, config) for _ in range(2))
    other = train_member(cohort_of(LABELS), bags, split, replace(config, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("stop_after", [1, 4])
def test_interrupted_and_resumed_it_is_the_same_to_the_byte(
    bags: Bags, split: Split, tmp_path: Path, stop_after: int
) -> None:
    config = MilConfig("clam-sb", {"hidden": 8}, epochs=6, lr=0.01, balance=True, batch=3)
    whole = train_member(cohort_of(LABELS), bags, split, config)

    def stop(epoch: int, of: int) -> None:
        if epoch == stop_after + 1:  # before this epoch is kept
            raise KeyboardInterrupt

    state = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_member(cohort_of(LABELS), bags, split, config, state=state, progress=stop)
    seen: list[int] = []
    resumed = train_member(
        cohort_of(LABELS), bags, split, config, state=state, progress=lambda epoch, of: seen.append(epoch)
    )
    assert seen[0] == stop_after + 1
    assert resumed.history == whole.history and resumed.best_epoch == whole.best_epoch
    assert all(np.array_equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_it_stops_by_validation_and_keeps_the_best(bags: Bags, split: Split) -> None:
    config = MilConfig("mean", {"hidden": 8}, epochs=60, lr=0.05, patience=3)
    member = train_member(cohort_of(LABELS), bags, split, config)
    losses = [row["validation_loss"] for row in member.history]
    assert len(losses) < 60 and len(losses) - member.best_epoch == 3
    assert losses[member.best_epoch - 1] == min(losses)
    logits = torch.from_numpy(np.stack([member.logits[i] for i in split.validation]))
    label = torch.tensor([LABELS[i] for i in split.validation])
    assert float(torch.nn.functional.cross_entropy(logits, label)) == pytest.approx(min(losses), rel=1e-5)


def test_test_slides_decide_nothing(bags: Bags, split: Split) -> None:
    config = MilConfig("mean", {"hidden": 8}, epochs=3)
    cohort = cohort_of(LABELS)
    cases = {i: case._replace(label=1 - case.label) if i in split.test else case for i, case in cohort.cases.items()}
    flipped = Cohort(cases, cohort.class_names)
    one, two = train_member(cohort, bags, split, config), train_member(flipped, bags, split, config)
    assert all(np.array_equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_the_scale_is_that_of_the_training_tiles_alone(bags: Bags, split: Split) -> None:
    member = train_member(cohort_of(LABELS), bags, split, MilConfig("mean", epochs=1))
    table = np.concatenate([bags[i].features.double().numpy() for i in split.train])
    np.testing.assert_allclose(member.net.mean.numpy(), table.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(member.net.std.numpy(), table.std(0), rtol=1e-5)
    mean, std = scale_of([BagStats(2, np.array([6.0]), np.array([18.0]))])
    assert mean.item() == 3 and std.item() == 0


def test_without_validation_it_trains_for_all_epochs(bags: Bags) -> None:
    member = train_member(cohort_of(LABELS), bags, Split(tuple(LABELS), (), ()), MilConfig(epochs=2, patience=None))
    assert len(member.history) == 2 and "validation_loss" not in member.history[0]


class TestHeads:
    def test_ordinal(self, tmp_path: Path) -> None:
        labels = {f"s{i:02d}": i % 3 for i in range(36)}
        bags = Bags(find_bags([write_bags(tmp_path, labels)]))
        split = k_fold(cohort_of(labels), 3, 0)[0]
        config = MilConfig("gated-attention", {"hidden": 16}, head="ordinal", epochs=60, lr=0.01)
        member = train_member(cohort_of(labels), bags, split, config)
        assert max(row["quadratic_kappa"] or 0 for row in member.history) > 0.6

    @pytest.mark.parametrize("head", ["hazard", "cox"])
    def test_survival(self, tmp_path: Path, head: Any) -> None:
        rng = np.random.default_rng(0)
        ids = [f"s{i:02d}" for i in range(80)]
        bags = Bags(find_bags([write_bags(tmp_path, {i: 2 * (n % 2) for n, i in enumerate(ids)})]))
        cases = {}
        for n, i in enumerate(ids):
            time = float(rng.exponential(2 if n % 2 else 40))
            cases[i] = Case(i, i, int(np.searchsorted([2, 8], time)), time, bool(rng.random() < 0.8))
        cohort = Cohort(cases, ("0 to 2", "2 to 8", "after 8"), (2.0, 8.0))
        split = k_fold(cohort, 4, 0)[0]
        config = MilConfig("gated-attention", {"hidden": 8}, head=head, epochs=30, lr=0.01, batch=10)
        member = train_member(cohort, bags, split, config)
        assert max(row["concordance"] for row in member.history) > 0.65
        probabilities = member.head.probabilities(torch.from_numpy(member.logits[split.test[0]]))
        assert float(probabilities.sum()) == pytest.approx(1) and len(probabilities) == 3
        assert (head == "cox") == (len(member.head.baseline) == 2)

    def test_binary(self, bags: Bags, split: Split) -> None:
        member = train_member(cohort_of(LABELS), bags, split, MilConfig(head="binary", epochs=20, lr=0.01))
        assert member.logits[split.test[0]].shape == (1,) and member.history[-1]["auroc"] > 0.8


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"architecture": "perceptron"}, "Known: mean"),
            ({"head": "vote"}, "Known: softmax"),
            ({"architecture": "clam-mb", "head": "ordinal"}, "softmax"),
            ({"architecture": "noisy-or", "head": "ordinal"}, "no order"),
            ({"architecture": "noisy-or", "head": "hazard"}, "no order"),
            ({"head": "cox"}, "Cox compares"),
            ({"epochs": 0}, "above 0"),
            ({"lr": float("nan")}, "above 0"),
            ({"arguments": {"wings": 2}}, "arguments do not fit"),
            ({"arguments": {"dropout": 2}}, "arguments do not fit"),
            ({"architecture": "top-k", "arguments": {"top": 0}}, "top=0"),
            ({"architecture": "dtfd", "arguments": {"groups": 0}}, "groups=0"),
        ],
    )
    def test_configurations(self, bags: Bags, split: Split, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(WsiError, match=says) as caught:
            train_member(cohort_of(LABELS), bags, split, replace(MilConfig(), **changes))
        assert isinstance(caught.value, (ModelError, TrainError))

    @pytest.mark.parametrize("part", ["validation", "test"])
    def test_a_bag_of_which_nothing_finite_can_be_said_is_named(self, bags: Bags, split: Split, part: str) -> None:
        class Wild:
            in_features, stats, name = bags.in_features, bags.stats, getattr(split, part)[1]

            def __getitem__(self, slide_id: str) -> TrainingBag:
                bag = bags[slide_id]
                wild = torch.where(torch.arange(WIDTH) % 2 > 0, 3e38, -3e38).expand(len(bag.features), -1)
                return bag._replace(features=wild) if slide_id == self.name else bag

        with pytest.raises(TrainError, match=f"{Wild.name}.*not finite"):
            train_member(cohort_of(LABELS), Wild(), split, MilConfig("mean", {"hidden": 8}, epochs=1))

    def test_a_loss_that_explodes(self, bags: Bags, split: Split) -> None:
        with pytest.raises(TrainError, match="not finite"):
            train_member(cohort_of(LABELS), bags, split, MilConfig(lr=1e30, epochs=3))


class Planted:
    """Bags of 10,000 tiles of which one, at a known place, tells the label."""

    in_features = 5

    def __init__(self, bags: int, tiles: int = 10_000) -> None:
        rng = np.random.default_rng(0)
        self.bags, self.place = {}, {}
        for i in range(bags):
            x = rng.normal(size=(tiles, 5)).astype(np.float32)
            self.place[str(i)] = int(rng.integers(tiles))
            x[self.place[str(i)], 0] += 12.0 * (i % 2)
            side = np.full(tiles, 100.0)
            boxes = np.stack([np.arange(tiles) % 100 * 100.0, np.arange(tiles) // 100 * 100.0, side, side], 1)
            self.bags[str(i)] = TrainingBag(torch.from_numpy(x), torch.from_numpy(boxes))
        self.stats = {
            i: BagStats(tiles, bag.features.double().sum(0).numpy(), (bag.features.double() ** 2).sum(0).numpy())
            for i, bag in self.bags.items()
        }

    def __getitem__(self, slide_id: str) -> TrainingBag:
        return self.bags[slide_id]


def test_features_of_the_test_bags_carry_the_label() -> None:
    assert features_of(1, 10, np.random.default_rng(0))[:, 0].max() > 2


@pytest.mark.parametrize(
    "name", ["attention", "gated-attention", "additive", "clam-sb", "clam-mb", "dsmil", "dtfd", "noisy-or", "transmil"]
)
def test_one_tile_in_ten_thousand_is_found(name: str) -> None:
    """Learnt from bags of 20 by their labels alone; no model learns it from labels of bags of 10,000."""
    bags, large = Planted(40, tiles=20), Planted(8, tiles=10_000)
    ids = tuple(bags.bags)
    cohort = cohort_of({i: int(i) % 2 for i in ids})
    config = MilConfig(name, {"hidden": 16, "dropout": 0.0}, epochs=30, lr=0.01, patience=None)
    net = train_member(cohort, bags, Split(ids, (), ()), config).net
    with torch.inference_mode():
        scores = {i: net(*large[i]) for i in large.bags}
    for i, found in scores.items():
        if int(i) % 2:
            ahead = int((found.attention > found.attention[large.place[i]]).sum())
            assert ahead <= (100 if name == "transmil" else 0)  # of 16 such tiles 12 are first, the worst is 32nd
            if found.contributions is not None:
                assert int((found.contributions[:, 1] - found.contributions[:, 0]).argmax()) == large.place[i]
