"""The shipped breast IDC model still does what its figures say, on patients it was not trained on."""

import hashlib
import importlib.util
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from safetensors.torch import load_file  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402

from wsi.nn.checkpoint import read_config  # noqa: E402
from wsi.nn.mil.attention import AttentionMil  # noqa: E402
from wsi.nn.p4m import P4MNet  # noqa: E402
from wsi.stain.range import StainRange  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "idc-breast"
DATA = Path(os.environ.get("WSI_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
NETS = {"wsi-p4m": P4MNet, "gated-attention": AttentionMil}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def load(folder: Path) -> "torch.nn.Module":
    config = read(folder, "config.json")
    net = NETS[config["architecture"]](**config["architecture_args"])
    net.load_state_dict(load_file(folder / "weights.safetensors"))
    return net.eval()


def training_of(folder: Path, name: str, file: str = "train.py"):
    """Import a folder's train.py, which holds the split and the reading of the data, or another program of it."""
    spec = importlib.util.spec_from_file_location(name, folder / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", [MODEL, MODEL / "mil"], ids=["patch", "mil"])
def test_weights_configuration_figures_and_card_are_of_one_training(folder):
    sha256 = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert read(folder, "config.json")["weights_sha256"] == sha256
    assert read(folder, "figures.json")["weights_sha256"] == sha256
    assert sha256 in (folder / "CARD.md").read_text(encoding="utf-8")
    assert (folder / "weights.safetensors").stat().st_size < 5_000_000


def test_the_head_reads_the_features_of_the_shipped_encoder():
    patch, mil = read(MODEL, "config.json"), read(MODEL / "mil", "config.json")
    assert mil["encoder_sha256"] == patch["weights_sha256"]
    assert mil["architecture_args"]["in_features"] == patch["num_features"] == load(MODEL).num_features


def test_the_shipped_network_does_not_see_the_orientation():
    net = load(MODEL)
    x = torch.randn(2, 3, 50, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(x).softmax(1)
        for turned in (x.rot90(1, (2, 3)), x.flip(2), x.flip(3).rot90(3, (2, 3))):
            torch.testing.assert_close(net(turned).softmax(1), expected, atol=1e-4, rtol=0)


def test_glass_is_no_cancer():
    config = read(MODEL, "config.json")
    normalise = config["transform"][1]["arguments"]
    glass = (torch.tensor([0.95, 0.95, 0.95]) - torch.tensor(normalise["mean"])) / torch.tensor(normalise["std"])
    with torch.no_grad():
        probability = load(MODEL)(glass.view(1, 3, 1, 1).expand(1, 3, 50, 50)).softmax(1)[0, 1]
    assert probability < config["threshold"]


def test_the_card_quotes_the_measured_figures():
    figures, card = read(MODEL, "figures.json"), (MODEL / "CARD.md").read_text(encoding="utf-8")
    for part in ("validation", "test", "external"):
        assert f"{figures[part]['auroc']:.3f}" in card
        low, high = figures[part]["ci95"]
        assert f"{low:.3f} to {high:.3f}" in card
    speed = figures["patches_per_core_second"]
    assert f"{speed['float32']} patches per core-second in float32, {speed['bfloat16']} in bfloat16" in card


@pytest.fixture(scope="module")
def held_back():
    """The patches of the test patients: (rgb uint8 (n, 3, 50, 50), labels (n,), cells (n, 2), patients (n,))."""
    if not (DATA / "patches" / "idc_breast_dev_a.zip").is_file():
        pytest.skip("the IDC patches are not here: set WSI_TEST_DATA to the data folder")
    training = training_of(MODEL, "idc_breast_training")
    images, labels, patients, cells = training.load_patches(DATA)
    test = [training.part_of(patient) == "test" for patient in patients]
    rgb = torch.from_numpy(images[test]).permute(0, 3, 1, 2).contiguous()
    return rgb, labels[test], cells[test], patients[test], training


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_auroc_on_the_patients_kept_back_is_the_one_stated(held_back, bf16):
    rgb, labels, cells, patients, training = held_back
    normalise = read(MODEL, "config.json")["transform"][1]["arguments"]
    transform = training.Normalise(normalise["mean"], normalise["std"])
    alone = training.predict(load(MODEL), rgb, transform, bf16=bf16)
    together = training.together(alone, cells, patients, read_config(MODEL, "patch").context)
    stated = read(MODEL, "figures.json")
    assert roc_auc_score(labels, alone) == pytest.approx(stated["test_alone"]["auroc"], abs=0.002)
    assert roc_auc_score(labels, together) == pytest.approx(stated["test"]["auroc"], abs=0.002)


@pytest.mark.skipif(
    not (DATA / "patches" / "idc_breast_dev_a.zip").is_file(), reason="needs the patches in shared/data"
)
def test_the_range_of_stains_is_that_of_the_training_patients():
    program = training_of(MODEL, "idc_stain", "stain.py")
    known, unlike = program.fit_range(DATA)
    shipped = StainRange.read(MODEL)
    assert shipped == StainRange.read(MODEL / "mil") and shipped.patients == 142
    assert shipped.limit == pytest.approx(known.limit, abs=0.01)  # processors may differ in the last bits
    assert [found["outside"] / found["slides"] < 0.1 for found in unlike.values()] == [True, True]
    card = (MODEL / "CARD.md").read_text(encoding="utf-8")
    assert f"lie within {shipped.limit:.3g}" in card
    assert f"{unlike['validation']['outside']} of\n{unlike['validation']['slides']} validation patients" in card
    assert f"{unlike['test']['outside']} of {unlike['test']['slides']} test patients" in card
    centres = program.load_program(MODEL / "shift.py").load_centres(DATA)
    outside = {name for name, tiles in centres.items() if known.check(tiles).outside}
    assert outside == {"1", "2", "4"}
    slide = program.check_slide(known, DATA / program.SLIDES[0])
    assert slide.outside is None and slide.distance < known.limit
