"""The measurement under other centres' colours: who is fitted on what, and that the card says what was measured."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from sklearn.metrics import roc_auc_score  # noqa: E402

from wsi.stain import fit  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "models" / "idc-breast"


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("idc_breast_shift", MODEL / "shift.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stained(rng: np.random.Generator, n: int, haematoxylin: float = 0.3) -> np.ndarray:
    """Patches of two stains, uint8 (n, 50, 50, 3)."""
    amounts = rng.gamma(2.0, [haematoxylin, 0.3], (n, 50, 50, 2))
    density = amounts @ [[0.56, 0.71, 0.44], [0.15, 0.82, 0.56]]
    return np.clip(np.rint(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8)


def test_tiles_are_averaged_over_whole_squares(program):
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    small = program.reduced(image, 16)
    assert small.shape == (2, 3, 3)
    for y in range(2):
        for x in range(3):
            square = image[16 * y : 16 * (y + 1), 16 * x : 16 * (x + 1)].reshape(-1, 3)
            np.testing.assert_allclose(small[y, x], square.astype(float).mean(0), atol=0.5)


def test_the_patches_with_most_haematoxylin_are_the_cell_rich_ones(program):
    rng = np.random.default_rng(1)
    images = stained(rng, 20)
    planted = [3, 11]
    images[planted] = stained(rng, 2, haematoxylin=0.6)
    found = program.cell_rich(images, 0.1)
    assert sorted(patch.tobytes() for patch in found) == sorted(images[i].tobytes() for i in planted)


def test_a_patient_is_normalised_by_its_own_pixels_alone(program):
    rng = np.random.default_rng(2)
    images, patients = stained(rng, 12), np.array(["a", "b", "c"] * 4)
    target = fit("macenko", images, images)
    before, fallbacks = program.normalised(images, patients, "macenko", target)
    assert not fallbacks

    other = images.copy()
    other[patients == "b"] = stained(rng, 4, haematoxylin=0.6)
    after, _ = program.normalised(other, patients, "macenko", target)
    np.testing.assert_array_equal(after[patients != "b"], before[patients != "b"])
    assert (after[patients == "b"] != before[patients == "b"]).any()

    alone = np.ascontiguousarray(images[patients == "c"])
    np.testing.assert_array_equal(before[patients == "c"], fit("macenko", alone, target).apply(alone))


def test_a_patient_that_cannot_be_measured_stays_as_it_is_and_is_counted(program):
    images, patients = stained(np.random.default_rng(3), 4), np.array(["a", "a", "glass", "glass"])
    images[2:] = 250
    for method in program.KINDS:
        out, fallbacks = program.normalised(images, patients, method, "veta")
        assert fallbacks == {"blank": 1}
        np.testing.assert_array_equal(out[2:], images[2:])


def test_one_shift_for_all_patients_fitted_on_those_trained_on(program):
    rng = np.random.default_rng(4)
    train, unseen = stained(rng, 40), stained(rng, 6)
    shifts = program.fit_shifts(train, {"0": stained(rng, 2, haematoxylin=0.5)})
    assert set(shifts) == {"macenko 0", "reinhard 0"}
    everyone = program.columns(shifts, unseen)
    some = program.columns(shifts, unseen[::2])
    assert set(everyone) == {"own", *shifts}
    for column in everyone:
        np.testing.assert_array_equal(everyone[column][::2], some[column])
        assert column == "own" or np.abs(everyone[column].astype(int) - everyone["own"]).mean() > 3


def test_bootstrap_agrees_with_the_slow_one_of_the_training_program(program):
    rng = np.random.default_rng(5)
    patients = rng.choice(["a", "b", "c", "d", "e", "f"], 150)
    labels = rng.integers(0, 2, 150)
    scores = np.round(labels + rng.normal(0, 1.5, 150), 1)  # with ties
    samples = program.aurocs(labels, scores, patients)
    assert samples.shape == (1 + program.DRAWS,)
    assert samples[0] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    stated = program.training.auroc(labels, scores, patients)
    value, low, high = program.with_interval(samples)
    assert value == stated["auroc"]
    assert [low, high] == pytest.approx(stated["ci95"], abs=1e-4)


def test_augmentation_without_colour_leaves_colours_as_they_are(program):
    colours = torch.tensor([[200, 120, 160], [90, 60, 130], [240, 238, 241]], dtype=torch.uint8)
    flat = colours[:, :, None, None].expand(3, 3, 50, 50).contiguous()
    torch.manual_seed(0)
    moved = program.training.augment(flat, colour=0.0)
    torch.testing.assert_close(moved, flat.float() / 255, atol=1e-4, rtol=0)
    torch.manual_seed(0)
    assert (program.training.augment(flat) - flat.float() / 255).abs().amax((1, 2, 3)).min() > 0.01


def test_the_card_shows_the_tables_that_were_measured(program):
    card = (MODEL / "CARD.md").read_text(encoding="utf-8")
    figures = json.loads((MODEL / "shift.json").read_text(encoding="utf-8"))
    for part in ("validation", "test") if "test" in figures else ("validation",):
        summary, centre_by_centre = program.tables(figures[part]).split("\n\n")
        assert summary in card
        assert part == "validation" or centre_by_centre in card
    assert program.compact(figures) + "\n" == (MODEL / "shift.json").read_text(encoding="utf-8")
