"""MIL models: every architecture from a folder, ensembles, doubts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import REPOSITORY
from tests.nn.mil.make import ALL, a_bag, a_net
from wsi.errors import ModelError
from wsi.nn.grade import feature_shift, load_mil_model
from wsi.nn.mil import MilNet


def write(folder: Path, nets: list[MilNet], architecture: str, arguments: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file((nets[0] if len(nets) == 1 else torch.nn.ModuleList(nets)).state_dict(), folder / "weights.safetensors")
    config = {
        "task": "mil",
        "architecture": architecture,
        "architecture_args": {"in_features": 6, **arguments},
        "num_classes": 3,
        "class_names": ["a", "b", "c"],
        "members": len(nets),
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def gated(folder: Path, members: int = 1, **changes: Any) -> Path:
    nets = [a_net("gated-attention", seed) for seed in range(members)]
    return write(folder, nets, "gated-attention", {"hidden": 8}, **changes)


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_loads_and_gives_its_networks_numbers(name: str, tmp_path: Path) -> None:
    from tests.nn.mil.make import SMALL

    net = a_net(name)
    model = load_mil_model(write(tmp_path / name, [net], name, {"hidden": 8} | SMALL.get(name, {})))
    features, boxes = a_bag(20)
    grade = model(features.numpy(), boxes.numpy())
    with torch.no_grad():
        scores = net(features, boxes)
    np.testing.assert_allclose(grade.probabilities, scores.logits.softmax(0).numpy(), atol=1e-6)
    np.testing.assert_array_equal(grade.attention, scores.attention.numpy())
    assert (grade.contributions is None) == (scores.contributions is None)
    assert grade.members.shape == (1, 3) and model.grade(grade.probabilities) in "abc"


def test_an_ensemble_is_the_mean_of_its_members(tmp_path: Path) -> None:
    model = load_mil_model(gated(tmp_path / "five", 5))
    features = a_bag(20)[0].numpy()
    grade = model(features)
    alone = [load_mil_model(write(tmp_path / str(i), [a_net("gated-attention", i)], "gated-attention", {"hidden": 8}))
             for i in range(5)]  # fmt: skip
    members = np.stack([one(features).probabilities for one in alone])
    np.testing.assert_allclose(grade.members, members, atol=1e-7)
    np.testing.assert_allclose(grade.probabilities, members.mean(0), atol=1e-7)
    attention = np.mean([one(features).attention for one in alone], axis=0)
    np.testing.assert_allclose(grade.attention, attention, atol=1e-7)
    assert model.doubts(grade, features).uncertainty.mutual_information is not None


def test_heads_and_temperature_of_the_configuration_are_used(tmp_path: Path) -> None:
    features = a_bag(9)[0].numpy()
    cold = load_mil_model(gated(tmp_path / "cold"))(features).probabilities
    hot = load_mil_model(gated(tmp_path / "hot", temperature=4.0))(features).probabilities
    np.testing.assert_allclose(hot, cold**0.25 / (cold**0.25).sum(), atol=1e-6)
    names = {"num_classes": 4, "class_names": list("abcd")}
    ordinal = load_mil_model(gated(tmp_path / "ordinal", head="ordinal", **names))
    grade = ordinal(features)
    assert grade.probabilities.shape == (4,)
    assert ordinal.grade(np.array([0.4, 0.05, 0.25, 0.3])) == "c"  # the median, not the likeliest
    cox = write(
        tmp_path / "cox", [a_net("mean", num_classes=1)], "mean", {"hidden": 8}, head="cox", baseline=[[0.9, 0.4]]
    )
    assert load_mil_model(cox)(features).probabilities.shape == (3,)


def test_abstaining_says_why(tmp_path: Path) -> None:
    features = a_bag(50)[0].numpy() * 3 + 1
    sure = load_mil_model(gated(tmp_path / "sure", conformal_threshold=0.34, largest_shift=5.0))
    grade = sure(features)._replace(probabilities=np.array([0.9, 0.05, 0.05]))
    assert sure.doubts(grade, features).prediction_set == ("a",) and sure.doubts(grade, features).abstain is None
    unsure = sure.doubts(grade._replace(probabilities=np.array([0.5, 0.4, 0.1])), features)
    assert unsure.prediction_set == ("a", "b") and "a or b cannot be told apart at 90%" in (unsure.abstain or "")
    none = sure.doubts(grade._replace(probabilities=np.array([0.33, 0.33, 0.33])), features)
    assert "no grade is likely enough" in (none.abstain or "")
    assert "outside the range of the training slides" in (sure.doubts(grade, features + 60).abstain or "")
    assert load_mil_model(gated(tmp_path / "plain")).doubts(grade, features)[1:] == (None, None)
    blind = sure.doubts(grade, features, unreadable=0.38).abstain
    assert blind == "38% of tissue unreadable" and sure.doubts(grade, features, unreadable=0.09).abstain is None


def test_slides_unlike_the_training_bags_in_size_are_abstained_from(tmp_path: Path) -> None:
    model = load_mil_model(gated(tmp_path / "m", bag_tiles=[8, 40]))
    for n, said in (
        (3, "3 tiles, but the head was trained on slides of 8"),
        (4, None),
        (80, None),
        (81, "81 tiles, but"),
    ):
        features = a_bag(n)[0].numpy()
        abstain = model.doubts(model(features), features).abstain
        assert abstain is None if said is None else str(abstain).startswith(said)
    assert load_mil_model("idc-breast").config.bag_tiles == (8, 40)
    for wrong in ([8], [40, 8], [0, 3]):
        with pytest.raises(ModelError, match="bag_tiles"):
            load_mil_model(gated(tmp_path / str(wrong), bag_tiles=wrong))


def test_evidence_is_what_moves_a_class_against_the_others(tmp_path: Path) -> None:
    features = a_bag(12)[0].numpy()
    three = load_mil_model(gated(tmp_path / "three"))
    grade = three(features)
    found = three.evidence(grade)
    assert list(found) == ["a", "b", "c"] and grade.contributions is not None
    np.testing.assert_allclose(sum(found.values()), 0, atol=1e-6)
    shifted = grade._replace(contributions=grade.contributions + np.arange(12)[:, None])  # softmax does not see it
    np.testing.assert_allclose(three.evidence(shifted)["a"], found["a"], atol=1e-5)
    two = load_mil_model("phantom")
    grade = two(np.zeros((5, 256), np.float32) + np.arange(5)[:, None])
    found = two.evidence(grade)
    assert list(found) == [two.config.class_names[1]] and grade.contributions is not None
    odds = np.log(grade.probabilities[1] / grade.probabilities[0])
    assert float(sum(found.values()).sum()) == pytest.approx(odds, abs=1e-4)  # contributions sum to the logits
    np.testing.assert_array_equal(two.evidence(grade._replace(contributions=None))["attention"], grade.attention)


def test_the_shift_is_that_of_the_mean_in_deviations() -> None:
    net = a_net("mean")
    z = ((torch.full((6,), 7.0) - net.mean) / net.std).double()
    assert feature_shift(net, torch.full((11, 6), 7.0)) == pytest.approx(float((z**2).mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head": "vote"}, "'vote' is not one of softmax"),
        ({"head": "binary"}, "two classes"),
        ({"head": "cox"}, r"baseline is \(0,\), not 1 members by 2 ends"),
        ({"head": "cox", "baseline": [0.9, 0.4]}, r"baseline is \(2,\), not 1 members"),
        ({"head": "cox", "baseline": [[0.9, float("nan")]]}, "baseline holds numbers"),
        ({"temperature": 0}, "temperature is 0"),
        ({"members": 0}, "members is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"conformal_threshold": float("nan")}, "conformal_threshold is nan"),
        ({"coverage": 7}, "coverage is 7"),
        ({"largest_shift": float("nan")}, "largest_shift is nan"),
        ({"num_classes": 2, "class_names": ["a", "b"]}, "disagree"),
        ({"architecture_args": {"in_features": 6, "wings": 2}}, "architecture_args do not fit"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        load_mil_model(write(tmp_path / "m", [a_net("gated-attention")], "gated-attention", {"hidden": 8}, **changes))


def test_bags_that_cannot_be_graded_name_the_model(tmp_path: Path) -> None:
    model = load_mil_model(gated(tmp_path / "m"))
    for features, says in (
        (np.zeros((0, 6)), "no tiles"),
        (np.zeros((2, 5)), "shape"),
        (np.full((2, 6), np.nan), "finite"),
    ):
        with pytest.raises(ModelError, match=says):
            model(features)


@pytest.mark.parametrize("name", ["idc-breast", "phantom"])
def test_shipped_heads_give_the_published_equations_numbers(name: str) -> None:
    """Written out here once more, from the file alone: what ships must not change its meaning."""
    from safetensors.numpy import load_file

    folder = REPOSITORY / "models" / name / "mil"
    p = {key: value.astype(np.float64) for key, value in load_file(folder / "weights.safetensors").items()}
    features = np.random.default_rng(0).normal(size=(300, len(p["mean"]))).astype(np.float16)
    h = np.maximum(((features - p["mean"]) / p["std"]) @ p["embedding.0.weight"].T + p["embedding.0.bias"], 0)
    gate = 1 / (1 + np.exp(-(h @ p["U.weight"].T + p["U.bias"])))
    scores = (np.tanh(h @ p["V.weight"].T + p["V.bias"]) * gate) @ p["w.weight"][0]
    attention = np.exp(scores) / np.exp(scores).sum()
    z = p["classifier.weight"] @ (attention @ h) + p["classifier.bias"]
    grade = load_mil_model(folder)(features)
    np.testing.assert_allclose(grade.probabilities, np.exp(z) / np.exp(z).sum(), atol=1e-6)
    np.testing.assert_allclose(grade.attention, attention, atol=1e-6)
    assert hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest() == load_mil_model(folder).sha256
