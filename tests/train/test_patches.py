"""The patch classifier: it learns what was planted, resumes to the byte, and writes a model that scores."""

from __future__ import annotations

import csv
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.nn.make import write_model
from tests.train.make import write_patches
from wsi.cli import app
from wsi.errors import ConfigMismatch, ModelError, TrainError, WsiError
from wsi.nn.patch import load_patch_model
from wsi.stain.range import StainRange
from wsi.train.classifier import PatchConfig
from wsi.train.cohort import Split, k_fold
from wsi.train.images import Labelled, Patches, read_folder
from wsi.train.patches import train_patches

torch.set_num_threads(1)  # tiny networks: a second thread only waits
CONFIG = PatchConfig("test_resnet", epochs=6, patience=6, batch=16, lr=5e-3, jpeg=0.3, precision="float32")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return read_folder(write_patches(tmp_path_factory.mktemp("patches"), 120), patient_in=r"p\d+")


@pytest.fixture(scope="module")
def patches(found: Labelled) -> Patches:
    return Patches(found.places)


@pytest.fixture(scope="module")
def trained(found: Labelled, patches: Patches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "model"
    train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], out, CONFIG, mpp=2.0)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_it_learns_what_was_planted_and_writes_a_model(trained: Path, found: Labelled, patches: Patches) -> None:
    figures = json.loads((trained / "figures.json").read_text())
    assert figures["test"]["auroc"] > 0.95 and figures["test"]["patches"] == 30
    model = load_patch_model(str(trained), device="cpu", precision="float32")
    assert (model.config.tile_px, model.config.mpp, model.config.positive_classes) == (32, 2.0, ("b",))
    assert figures["weights_sha256"] == model.sha256
    table = rows_of(trained / "predictions.csv")
    assert {row["split"] for row in table} == {"validation", "test"}
    said = model(patches.read([row["path"] for row in table])).probabilities[:, 1]
    np.testing.assert_allclose(said, [float(row["prob_b"]) for row in table], atol=1e-5)
    card = (trained / "CARD.md").read_text()
    assert model.sha256 in card and "Research use only" in card and "32 px at 2 microns" in card
    assert (trained / "log.png").read_bytes().startswith(b"\x89PNG")
    log = rows_of(trained / "log.csv")
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])


def test_the_stains_of_the_training_patients_are_kept(
    trained: Path, found: Labelled, patches: Patches, tmp_path: Path
) -> None:
    said = json.loads((trained / "stain.json").read_text())
    assert said["limit"] is None and "of 6 training patients; 19 or more" in said["reason"]  # twelve in four folds
    alone = {i: case._replace(patient=i) for i, case in found.cohort.cases.items()}
    train_patches(
        replace(found.cohort, cases=alone), patches, k_fold(found.cohort, 4, 0)[0], tmp_path, replace(CONFIG, epochs=1),
        mpp=2.0,
    )  # fmt: skip
    assert "whose the patches are is not known" in json.loads((tmp_path / "stain.json").read_text())["reason"]
    many = read_folder(write_patches(tmp_path / "many", 176, patients=44), patient_in=r"p\d+")
    own = Patches(many.places)
    figures = train_patches(
        many.cohort, own, k_fold(many.cohort, 4, 0)[0], tmp_path / "out", replace(CONFIG, epochs=1), mpp=2.0
    )
    known = StainRange.read(tmp_path / "out")
    assert known is not None and known.limit is not None and known.patients == len(known.slides) >= 19
    assert figures["outside_stains"]["test"]["slides"] > 0
    split = k_fold(many.cohort, 4, 0)[0]
    who = many.cohort.cases[split.train[0]].patient
    rgb = own.read([i for i, case in many.cohort.cases.items() if case.patient == who])
    assert known.check(rgb).distance == 0.0


def test_it_learns_in_bfloat16_too(found: Labelled, patches: Patches, tmp_path: Path) -> None:
    config = replace(CONFIG, precision="bfloat16", epochs=4)
    figures = train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], tmp_path / "out", config, mpp=2.0)
    assert figures["test"]["auroc"] > 0.9
    assert (
        load_patch_model(str(tmp_path / "out"), device="cpu", precision="float32").sha256 == figures["weights_sha256"]
    )


def test_no_patient_is_in_two_parts(trained: Path) -> None:
    parts: dict[str, set[str]] = {}
    for row in rows_of(trained / "split.csv"):
        parts.setdefault(row["patient"], set()).add(row["split"])
    assert len(parts) == 12 and all(len(found) == 1 for found in parts.values())


@pytest.mark.parametrize("stop_after", [1, 4])
def test_stopped_and_begun_again_it_gives_the_same_bytes(
    trained: Path, found: Labelled, patches: Patches, tmp_path: Path, stop_after: int
) -> None:
    def stop(epoch: int, of: int) -> None:
        if epoch == stop_after + 1:  # before this epoch is kept
            raise KeyboardInterrupt

    split = k_fold(found.cohort, 4, 0)[0]
    out = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        train_patches(found.cohort, patches, split, out, CONFIG, mpp=2.0, progress=stop)
    assert not (out / "config.json").exists()
    seen: list[int] = []
    train_patches(
        found.cohort, patches, split, out, CONFIG, mpp=2.0, progress=lambda epoch, of: seen.append(epoch)
    )  # fmt: skip
    assert seen[0] == stop_after + 1
    for path in trained.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_damaged_state_is_named(trained: Path, found: Labelled, patches: Patches, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shutil.copytree(trained, out)
    (out / "state.safetensors").write_bytes((trained / "state.safetensors").read_bytes()[:3000])
    with pytest.raises(TrainError, match=r"state\.safetensors: is damaged"):
        train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], out, CONFIG, mpp=2.0)
    assert (out / "weights.safetensors").read_bytes() == (trained / "weights.safetensors").read_bytes()


def test_validation_alone_stops_it_and_test_changes_nothing(
    trained: Path, found: Labelled, patches: Patches, tmp_path: Path
) -> None:
    """With the test part's labels turned round the weights stay, and so they do without it."""
    split = k_fold(found.cohort, 4, 0)[0]
    train_patches(found.cohort, patches, split._replace(test=()), tmp_path / "model", CONFIG, mpp=2.0)
    assert (tmp_path / "model/weights.safetensors").read_bytes() == (trained / "weights.safetensors").read_bytes()
    config = replace(CONFIG, epochs=40, patience=2, lr=0.05)
    figures = train_patches(found.cohort, patches, split, tmp_path / "stopped", config, mpp=2.0)
    log = rows_of(tmp_path / "stopped" / "log.csv")
    losses = [float(row["validation_loss"]) for row in log]
    assert len(log) == figures["best_epoch"] + 2 < 40 and figures["best_epoch"] == 1 + int(np.argmin(losses))


class TestStart:
    """Begun from a model, or an encoder."""

    def test_a_linear_probe_moves_the_classifier_alone(self, found: Labelled, patches: Patches, tmp_path: Path) -> None:
        base = write_model(tmp_path / "base")
        config = PatchConfig(start=str(base), frozen=True, epochs=8, lr=0.05, precision="float32")
        split = k_fold(found.cohort, 4, 0)[0]
        train_patches(found.cohort, patches, split, tmp_path / "probe", config, mpp=1.0)
        before, after = (load_patch_model(str(folder), device="cpu", precision="float32", fold=False) for folder in
                         (base, tmp_path / "probe"))  # fmt: skip
        rgb = patches.read(split.test)
        np.testing.assert_array_equal(before(rgb).features, after(rgb).features)
        assert after.config.mean == before.config.mean
        moved = [
            name
            for name, value in after.net.state_dict().items()
            if not torch.equal(value, before.net.state_dict()[name])
        ]
        assert moved == ["net.fc.weight", "net.fc.bias"]
        log = rows_of(tmp_path / "probe" / "log.csv")
        assert float(log[-1]["train_loss"]) < 0.9 * float(log[0]["train_loss"])

    def test_fine_tuning_begins_where_the_model_was(self, found: Labelled, patches: Patches, tmp_path: Path) -> None:
        """At a learning rate of nothing, the model of the same classes is what it was."""
        base = write_model(tmp_path / "base", classes=("a", "b"))
        config = PatchConfig(start=str(base), epochs=1, lr=1e-12, weight_decay=0, precision="float32")
        train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], tmp_path / "tuned", config, mpp=1.0)
        before, after = (
            load_patch_model(str(folder), device="cpu", fold=False) for folder in (base, tmp_path / "tuned")
        )
        for name, weight in before.net.named_parameters():
            torch.testing.assert_close(weight, after.net.get_parameter(name), rtol=0, atol=1e-6)

    def test_from_an_encoder_of_another_size(self, found: Labelled, patches: Patches, tmp_path: Path) -> None:
        import timm
        from safetensors.torch import save_file

        torch.manual_seed(0)
        net: Any = timm.create_model("test_vit", num_classes=0)
        (tmp_path / "vit").mkdir()
        save_file(net.state_dict(), tmp_path / "vit" / "model.safetensors")
        facts = {"input_size": [3, 160, 160], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        about = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": facts}
        (tmp_path / "vit" / "config.json").write_text(json.dumps(about))
        config = PatchConfig(start=str(tmp_path / "vit"), frozen=True, epochs=3, lr=0.01, precision="float32")
        figures = train_patches(
            found.cohort, patches, k_fold(found.cohort, 4, 0)[0], tmp_path / "out", config, mpp=1.0
        )  # fmt: skip
        model = load_patch_model(str(tmp_path / "out"), device="cpu", precision="float32")
        assert model.config.architecture == "wsi-encoder" and model.config.resize_px == 160
        table = rows_of(tmp_path / "out" / "predictions.csv")
        said = model(patches.read([row["path"] for row in table])).probabilities[:, 1]
        np.testing.assert_allclose(said, [float(row["prob_b"]) for row in table], atol=1e-5)
        assert figures["weights_sha256"] == model.sha256


class TestBadInput:
    def test_no_validation_and_a_leak(self, found: Labelled, patches: Patches, tmp_path: Path) -> None:
        split = k_fold(found.cohort, 4, 0)[0]
        for bad, says in (
            (split._replace(validation=()), "validation part is empty"),
            (Split(split.train, split.validation, (split.train[0],)), "is in train and in test"),
        ):
            with pytest.raises(TrainError, match=says):
                train_patches(found.cohort, patches, bad, tmp_path / "out", CONFIG, mpp=1.0)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (PatchConfig(frozen=True), "random features"),
            (PatchConfig(start="phantom", arguments={"head": 3}), "has its own"),
            (PatchConfig(epochs=0), "above 0"),
            (PatchConfig(stain=2), "from 0 to 1"),
            (PatchConfig("resnet1"), "known to timm"),
            (PatchConfig("test_resnet", {"wings": 2}), "do not fit"),
            (PatchConfig("vit_tiny_patch16_224"), "does not take patches of 32 px"),
            (PatchConfig(start="nowhere"), "no such encoder"),
        ],
    )
    def test_what_cannot_be_trained(
        self, found: Labelled, patches: Patches, tmp_path: Path, config: PatchConfig, says: str
    ) -> None:
        with pytest.raises(WsiError, match=says):
            train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], tmp_path / "out", config, mpp=1.0)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("config", "says"),
        [(PatchConfig("test_resnet", batch=1), "Use --batch 4"), (PatchConfig(batch=64, lr=1e30), "is not finite")],
    )
    def test_what_teaches_nothing(
        self, found: Labelled, patches: Patches, tmp_path: Path, config: PatchConfig, says: str
    ) -> None:
        """One value has no variance; after one step of a huge rate only validation sees what became of the weights."""
        with pytest.raises(TrainError, match=says):
            train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], tmp_path / "out", config, mpp=1.0)

    def test_a_folder_of_another_training(self, trained: Path, found: Labelled, patches: Patches) -> None:
        before = (trained / "config.json").read_bytes()
        with pytest.raises(ConfigMismatch, match="another config"):
            train_patches(
                found.cohort, patches, k_fold(found.cohort, 4, 0)[0], trained, replace(CONFIG, seed=1), mpp=2.0
            )
        with pytest.raises(ConfigMismatch, match="another patches, labels or split"):
            train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[1], trained, CONFIG, mpp=2.0)
        run = json.loads((trained / "run.json").read_text())
        (trained / "run.json").write_text(json.dumps(run | {"weights to begin from": "b" * 64}))
        with pytest.raises(ConfigMismatch, match="another weights to begin from"):
            train_patches(found.cohort, patches, k_fold(found.cohort, 4, 0)[0], trained, CONFIG, mpp=2.0)
        (trained / "run.json").write_text(json.dumps(run))
        with pytest.raises(ModelError, match="no such class"):
            train_patches(
                found.cohort, patches, k_fold(found.cohort, 4, 0)[0], trained, CONFIG, mpp=2.0, positive=["c"]
            )  # fmt: skip
        assert (trained / "config.json").read_bytes() == before


@pytest.mark.parametrize("change", [{"lr": float("nan")}, {"lr": float("inf")}, {"weight_decay": float("nan")}])
def test_numbers_that_are_none_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(TrainError, match="configuration"):
        replace(CONFIG, **change).check()


class TestCommand:
    def run(self, *words: object) -> Any:
        return CliRunner().invoke(app, ["train", "patches", *map(str, words)])

    def test_from_a_folder_to_a_model(self, tmp_path: Path) -> None:
        folder = write_patches(tmp_path / "patches", 60)
        done = self.run(
            folder, "--mpp", 2, "--patient-in", r"p\d+", "-a", "test_resnet", "--epochs", 1, "--folds", 3, "-o",
            tmp_path / "model", "--json", "--device", "cpu",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["test"]["patches"] == 20
        assert load_patch_model(str(tmp_path / "model")).config.class_names == ("a", "b")

    def test_wrong_calls_say_what_to_do(self, tmp_path: Path) -> None:
        folder = write_patches(tmp_path / "patches", 12, patients=2)
        (tmp_path / "results/a/store.zarr").mkdir(parents=True)
        for words, says in (
            ([folder], "Give --mpp"),
            *([[tmp_path / place, "--mpp", 1], "outlines with --annotations"] for place in ("results", "results/a")),
            ([tmp_path / "results/a/store.zarr", "--mpp", 1], "outlines with --annotations"),
            ([folder, "--mpp", 1, "-a", "wsi-p4m", "--set", "head=-3", "--folds", 3], "do not fit wsi-p4m"),
            ([folder, "--mpp", 1, "--patient-in", r"p\d+"], "there are 2 patients"),
            ([folder, folder, "--mpp", 1], "2 places are given"),
            ([folder, "--annotations", tmp_path / "none"], "there is no such folder"),
            ([tmp_path / "none.csv", "--mpp", 1], "cannot be read"),
        ):
            done = self.run(*words, "-o", tmp_path / "out")
            assert isinstance(done.exception, WsiError) and says in str(done.exception)
        assert not (tmp_path / "out").exists()


def test_real_patches_beat_chance_on_kept_back_patients(data_dir: Path, tmp_path: Path) -> None:
    """Breast H&E, 30 patients of whom six are kept back; three epochs."""
    archive = data_dir / "patches" / "idc_breast_dev_a.zip"
    if not archive.is_file():
        pytest.skip("idc_breast_dev_a.zip is not here")
    with zipfile.ZipFile(archive) as opened:
        by_patient: dict[str, list[str]] = {}
        for name in sorted(opened.namelist()):
            if match := re.search(r"(\d+)_idx5_.*class[01]\.png$", name):
                by_patient.setdefault(match[1], []).append(name)
        for names in list(by_patient.values())[:30]:
            for name in names[:: max(1, len(names) // 40)]:
                path = tmp_path / "patches" / ("idc" if name.endswith("class1.png") else "other") / Path(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(opened.read(name))
    found = read_folder(tmp_path / "patches", classes=["other", "idc"], patient_in=r"(\d+)_idx5")
    patches = Patches(found.places, subset=True)
    cohort, _ = found.without(patches.left_out)
    config = PatchConfig(arguments={"widths": [4, 6, 8], "head": 16}, epochs=3, balance=True, precision="float32")
    figures = train_patches(cohort, patches, k_fold(cohort, 5, 0)[0], tmp_path / "model", config, mpp=4.0)
    assert figures["test"]["patients"] == 6 and figures["test"]["auroc"] > 0.7
