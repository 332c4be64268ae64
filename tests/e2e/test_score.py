"""The command line from end to end: results, resuming, and every kind of bad input."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import Run, digest, rows
from tests.nn.make import write_head, write_model
from tests.slide.make import halved, section, spoil, write_jpeg_pyramid, write_pyramid
from wsi import infer, run
from wsi.archive.folder import Tables
from wsi.nn.patch import load_patch_model
from wsi.phantom import PhantomConfig, write_phantom
from wsi.result import SlideResult
from wsi.slide import open_slide
from wsi.stain import StainTransform
from wsi.stain.range import StainRange, measure, point_of, sample_store
from wsi.store import PatchStore
from wsi.units import Box

PICTURES = ("overlay.png", "tiles.png")
NUMBERS = ("store.zarr", "tiles.geojson.gz", "regions.geojson", *PICTURES, "seconds.json", "result.json")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", mpp=1.0)
    patch_model = load_patch_model(str(folder), device="cpu")
    write_head(folder / "mil", patch_model.num_features, patch_model.sha256)
    return folder


STRIDE = 10


@pytest.fixture(scope="session")
def whole(slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slide b scored without interruption, in six shards."""
    out = tmp_path_factory.mktemp("whole") / "r"
    assert in_a_process(slides, model, out).wait() == 0
    return out


def in_a_process(slides: Path, model: Path, out: Path) -> subprocess.Popen[bytes]:
    """Score slide b in a process of its own."""
    command = [sys.executable, "-c", "from wsi.cli import main; main()", "score", slides / "b.svs", "-m", model]
    return subprocess.Popen([*map(str, command), "-o", str(out), "-q", "--stride", str(STRIDE)])


class TestResults:
    def test_what_lies_there_afterwards(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "results"
        code, stdout, stderr = wsi("score", slides, "--model", model, "-o", out, "--json", "--quiet")
        assert code == 0 and stderr == ""
        assert [row["slide_id"] for row in json.loads(stdout)["scored"]] == ["a", "b"]
        table = rows(out / "slides.csv")
        assert [row["status"] for row in table] == ["scored", "scored"] and rows(out / "failures.csv") == []
        run = json.loads((out / "run.json").read_text())
        assert run["configuration"]["model"] == "tiny" and run["versions"]["torch"]
        for row in table:
            folder = out / row["slide_id"]
            assert sorted(path.name for path in folder.iterdir()) == sorted(NUMBERS)
            result = json.loads((folder / "result.json").read_text())
            assert row["grade"] in ("tumour", "no tumour") and result["grade"] == row["grade"]
            assert float(row["prob_tumour"]) + float(row["prob_no tumour"]) == pytest.approx(1, abs=1e-5)
            assert result["mpp"] == 0.5 and result["mpp_source"] == "vendor:aperio"
            assert (result["grade_threshold"], result["threshold"]) == (0.5, 0.5)
            decided = "tumour" if result["positive_probability"] >= result["grade_threshold"] else "no tumour"
            assert result["grade"] == decided
            null = {name for name, value in (result | result["uncertainty"]).items() if value is None}
            assert null - {"stain", "mpp_given", "mask", "mask_sha256"} == set(result["reasons"])  # all but inputs
            store = PatchStore.open(folder / "store.zarr")
            assert len(store) == int(row["n_tiles"]) > 20 and store.missing() == []
            assert float(row["positive_mm2"]) <= float(row["tissue_mm2"])
            assert store.get("attention").sum() == pytest.approx(1, abs=1e-5)
            # tissue is an ellipse of known axes
            true_mm2 = np.pi * (0.4 * 900 * 0.5e-3) * (0.4 * 700 * 0.5e-3)
            assert float(row["tissue_mm2"]) == pytest.approx(true_mm2, rel=0.1)
            with gzip.open(folder / "tiles.geojson.gz") as file:
                tiles = json.load(file)["features"]
            assert len(tiles) == len(store)
            measured = [feature["properties"]["measurements"]["prob_tumour"] for feature in tiles]
            np.testing.assert_allclose(measured, store.get("probabilities")[:, 1], atol=1e-4)
            for name in PICTURES:
                with Image.open(folder / name) as picture:
                    assert min(picture.size) > 300

    def test_the_store_holds_what_the_model_says_of_the_slide(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        """Patches cut one by one, scored one by one, give the same probabilities."""
        wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "--pixels", "zstd", "--precision", "float32")
        store = PatchStore.open(tmp_path / "r/a/store.zarr")
        patch_model = load_patch_model(str(model), device="cpu", precision="float32")
        with open_slide(slides / "a.svs") as slide:
            for i in (0, 17, len(store) - 1):
                rgb = slide.read(store.grid.box(i), (32, 32))
                np.testing.assert_array_equal(store.get("pixels")[i], rgb)
                np.testing.assert_allclose(
                    store.get("probabilities")[i], patch_model(rgb[None]).probabilities[0], atol=2e-5
                )

    def test_the_lazy_array_cuts_the_same_patches(self, whole: Path, slides: Path) -> None:
        store = PatchStore.open(whole / "b/store.zarr")
        lazy = store.dask()
        assert lazy.shape == (len(store), 32, 32, 3)
        with open_slide(slides / "b.svs") as slide:
            np.testing.assert_array_equal(lazy[700].compute(), slide.read(store.grid.box(700), (32, 32)))

    def test_threads_and_batches_change_no_byte(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        for threads, name in ((1, "one"), (8, "eight")):
            wsi("score", slides, "-m", model, "-o", tmp_path / name, "--threads", threads, "-q")
        assert digest(tmp_path / "one") == digest(tmp_path / "eight") != {}
        wsi("score", slides, "-m", model, "-o", tmp_path / "batches", "--batch-size", 7, "-q", "--precision", "float32")
        wsi("score", slides, "-m", model, "-o", tmp_path / "plain", "-q", "--precision", "float32")
        for name in ("a", "b"):
            one, two = (PatchStore.open(tmp_path / run / name / "store.zarr") for run in ("batches", "plain"))
            np.testing.assert_allclose(one.get("probabilities"), two.get("probabilities"), atol=2e-5)

    def test_stains_are_normalised_for_the_model(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        common = ("score", slides / "a.svs", "-m", model, "-q", "--pixels", "zstd", "--precision", "float32")
        assert wsi(*common, "-o", tmp_path / "plain")[0] == 0
        assert wsi(*common, "-o", tmp_path / "stained", "--stain", "macenko")[0] == 0
        plain, stained = (PatchStore.open(tmp_path / name / "a/store.zarr") for name in ("plain", "stained"))
        np.testing.assert_array_equal(plain.get("pixels"), stained.get("pixels"))  # as they were read
        result = json.loads((tmp_path / "stained/a/result.json").read_text())
        assert result["stain"] and result["flags"] == ["grade-and-tiles-disagree"]  # as weights at random do
        transform = StainTransform.from_json(json.dumps(result["stain"]))
        expected = load_patch_model(str(model), device="cpu", precision="float32")(
            transform.apply(np.ascontiguousarray(stained.get("pixels")[:5]))
        )
        np.testing.assert_allclose(stained.get("probabilities")[:5], expected.probabilities, atol=2e-5)
        assert np.abs(stained.get("probabilities") - plain.get("probabilities")).max() > 1e-3
        code, _, stderr = wsi(*common, "-o", tmp_path / "plain", "--stain", "macenko")
        assert code == 2 and 'stain was null, now "macenko"' in stderr
        code, _, stderr = wsi(*common, "-o", tmp_path / "x", "--stain", "magic")
        assert code == 2 and "Known methods" in stderr

    def test_no_head_no_grade(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        wsi("score", slides / "a.svs", "-m", model, "--mil", "none", "-o", tmp_path, "-q")
        result = json.loads((tmp_path / "a/result.json").read_text())
        assert result["grade"] is None and result["reasons"]["grade"] == "no MIL model"
        ungraded = ("probabilities", "positive_probability", "grade_threshold", "uncertainty")
        assert all(result[name] is None and result["reasons"][name] == "no MIL model" for name in ungraded)
        assert rows(tmp_path / "slides.csv")[0]["grade"] == ""

    def test_a_grade_says_how_sure_it_is_and_when_not_to_use_it(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        patch_model = load_patch_model(str(model), device="cpu")
        unsure = {"conformal_threshold": 0.01, "largest_shift": 1e-6}
        write_head(tmp_path / "unsure", patch_model.num_features, patch_model.sha256, **unsure)
        for mil, out in (([], tmp_path / "sure"), (["--mil", tmp_path / "unsure"], tmp_path / "doubt")):
            assert wsi("score", slides / "a.svs", "-m", model, *mil, "-o", out, "-q")[0] == 0
        sure, doubt = (json.loads((tmp_path / name / "a" / "result.json").read_text()) for name in ("sure", "doubt"))
        p = np.array(list(sure["probabilities"].values()))
        assert sure["uncertainty"]["entropy"] == pytest.approx(float(-(p * np.log(p)).sum()), abs=1e-4)
        assert sure["uncertainty"]["mutual_information"] is None and sure["uncertainty"]["abstain"] is None
        assert "abstain" not in sure["flags"] and "abstain" in doubt["flags"]
        assert doubt["uncertainty"]["prediction_set"] == ["no tumour", "tumour"]
        for words in ("cannot be told apart", "outside the range of the training slides"):
            assert words in doubt["uncertainty"]["abstain"] and any(words in line for line in doubt["warnings"])
        write_head(tmp_path / "never", patch_model.num_features, patch_model.sha256, threshold=1.0)
        words = ("--mil", tmp_path / "never", "--threshold", 0, "-o", tmp_path / "apart", "-q")
        assert wsi("score", slides / "a.svs", "-m", model, *words)[0] == 0
        apart = json.loads((tmp_path / "apart/a/result.json").read_text())
        assert apart["grade"] == "no tumour" and "grade-and-tiles-disagree" in apart["flags"]
        assert f"{apart['positive_mm2']:g} mm2 are tumour" in apart["warnings"][0]

    def test_a_stain_outside_the_training_range_is_a_reason_to_abstain(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        assert wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "plain", "-q")[0] == 0
        own = point_of(measure(sample_store(PatchStore.open(tmp_path / "plain/a/store.zarr"))))
        for name, vectors in (("here", own[:6]), ("elsewhere", (*own[3:6], 0.1, 0.3, 0.95))):
            folder = shutil.copytree(model, tmp_path / name)
            points = [(*vectors, own[6] * s, own[7] * s) for s in np.geomspace(0.3, 3, 40).tolist()]
            StainRange.of(points, range(40)).write(folder)
        results = {}
        for name in ("here", "elsewhere"):
            assert wsi("score", slides / "a.svs", "-m", tmp_path / name, "-o", tmp_path / f"r-{name}", "-q")[0] == 0
            results[name] = json.loads((tmp_path / f"r-{name}/a/result.json").read_text())
            results[name]["flags"].remove("grade-and-tiles-disagree")  # of random weights, and of both alike
        inside, outside = results["here"], results["elsewhere"]
        assert inside["uncertainty"]["abstain"] is None and inside["flags"] == [] and inside["stain_distance"] < 2
        assert outside["flags"] == ["stain-outside", "abstain"] and outside["stain_distance"] > 20
        assert "stain outside the training range: haematoxylin" in outside["uncertainty"]["abstain"]
        assert "40 training patients" in outside["warnings"][0] and outside["grade"] == inside["grade"]
        # a model of another name is refused by its name; one of the same name with another range, for that
        code, _, stderr = wsi("score", slides / "a.svs", "-m", tmp_path / "elsewhere", "-o", tmp_path / "r-here", "-q")
        assert code == 2 and 'model was "here", now "elsewhere"' in stderr and "stain_range" not in stderr
        shutil.copytree(tmp_path / "elsewhere", tmp_path / "other/here")
        code, _, stderr = wsi("score", slides / "a.svs", "-m", tmp_path / "other/here", "-o", tmp_path / "r-here", "-q")
        assert code == 2 and "stain_range was" in stderr
        # the tile model's own range warns where there is no head, too
        words = ("--mil", "none", "-o", tmp_path / "bare", "-q")
        assert wsi("score", slides / "a.svs", "-m", tmp_path / "elsewhere", *words)[0] == 0
        assert json.loads((tmp_path / "bare/a/result.json").read_text())["flags"] == ["stain-outside"]
        (tmp_path / "here" / "stain.json").write_text("{}")
        code, _, stderr = wsi("score", slides / "a.svs", "-m", tmp_path / "here", "-o", tmp_path / "no", "-q")
        assert code == 2 and "stain.json: is damaged" in stderr

    def test_a_model_without_a_range_says_so(self, whole: Path) -> None:
        result = json.loads((whole / "b/result.json").read_text())
        assert result["stain_distance"] is None and "does not say which stains" in result["reasons"]["stain_distance"]


class TestResume:
    def test_an_explanation_is_added_to_what_is_scored(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, later = tmp_path / "first", tmp_path / "later"
        words = ("-m", model, "-q", "--stain", "macenko")
        assert wsi("score", slides, *words, "-o", first, "--explain")[0] == 0
        assert wsi("score", slides, *words, "-o", later)[0] == 0
        plain, seconds = digest(later), (later / "a/seconds.json").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(run, "score_tiles", None)  # would fail
            assert wsi("score", slides, *words, "-o", later, "--explain")[0] == 0
            assert (later / "a/seconds.json").read_bytes() == seconds
        explained = digest(later)
        assert explained == digest(first) and {"a/explained.png", "b/explained.png"} == set(explained) - set(plain)
        assert {name: explained[name] for name in plain} == plain
        for name in "ab":
            (later / name / "explained.png").unlink()
        whole = (slides / "a.svs").read_bytes()
        (slides / "a.svs").write_bytes(whole[: len(whole) // 3])
        try:  # what cannot be explained stays scored, is a failure of this run, and holds nobody up
            assert wsi("score", slides, *words, "-o", later, "--explain")[0] == 3
            (row,) = rows(later / "failures.csv")
            assert row["slide_id"] == "a" and "of another file than lies there now" in row["error"]
            assert [row["slide_id"] for row in rows(later / "slides.csv")] == ["a", "b"]
            assert {k: v for k, v in digest(later).items() if "failure" not in k} == {
                k: v for k, v in explained.items() if k != "a/explained.png"
            }
        finally:
            (slides / "a.svs").write_bytes(whole)
        assert wsi("score", slides, *words, "-o", later, "--explain")[0] == 0
        assert digest(later) == explained
        write_phantom(tmp_path / "other.svs", PhantomConfig(size=(1500, 1100), seed=9, tumours=0))
        (slides / "a.svs").write_bytes((tmp_path / "other.svs").read_bytes())
        (later / "a/explained.png").unlink()
        try:  # another slide under the name of one that was scored
            assert wsi("score", slides, *words, "-o", later, "--explain")[0] == 3
            assert "is of another file" in rows(later / "failures.csv")[0]["error"]
        finally:
            (slides / "a.svs").write_bytes(whole)

    def test_the_same_again_does_nothing(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert wsi("score", slides, "-m", model, "-o", tmp_path, "-q")[0] == 0
        before, table = digest(tmp_path), (tmp_path / "slides.csv").read_bytes()
        monkeypatch.setattr(run, "score_slide", None)  # would fail
        assert wsi("score", slides, "-m", model, "-o", tmp_path, "-q")[0] == 0
        assert digest(tmp_path) == before and (tmp_path / "slides.csv").read_bytes() == table

    def test_after_an_interruption_only_what_is_missing_is_computed(
        self, wsi: Run, slides: Path, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        write = PatchStore.write

        def stop_after_two(self: PatchStore, shard: int, values: dict[str, np.ndarray]) -> None:
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(shard)
            write(self, shard, values)

        arguments = ("score", slides / "b.svs", "-m", model, "-o", tmp_path, "-q", "--stride", STRIDE)
        monkeypatch.setattr(PatchStore, "write", stop_after_two)
        code, _, stderr = wsi(*arguments)
        assert code == 130 and "goes on from here" in stderr
        monkeypatch.setattr(PatchStore, "write", write)
        read: list[range] = []
        stream = infer.stream
        monkeypatch.setattr(infer, "stream", lambda s, g, runs, **k: read.extend(runs) or stream(s, g, runs, **k))
        assert wsi(*arguments)[0] == 0
        assert read[0].start == 512  # two shards of 256 were kept
        assert digest(tmp_path) == digest(whole)

    def test_after_a_kill(self, slides: Path, model: Path, whole: Path, tmp_path: Path) -> None:
        process = in_a_process(slides, model, tmp_path)
        while process.poll() is None and not list(tmp_path.glob("b/store.zarr/features/c/*/0")):
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert in_a_process(slides, model, tmp_path).wait() == 0
        assert digest(tmp_path) == digest(whole)

    def test_another_configuration_is_refused_and_named(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "-q")
        before = digest(tmp_path / "r")
        code, _, stderr = wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "-q", "--stride", 16)
        assert code == 2 and "stride_px was null, now 16" in stderr and "--force" in stderr
        assert digest(tmp_path / "r") == before
        code, _, stderr = wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "-q", "--slide-mpp", 0.4)
        assert code == 2 and "the file's own microns per pixel, now 0.4" in stderr
        code, _, stderr = wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "-q", "--mpp", 0.4)
        assert code == 2 and "No such option: --mpp" in stderr and "--slide-mpp" in stderr
        code, _, stderr = wsi("score", slides / "a.svs", "-m", "idc-breast", "-o", tmp_path / "r", "-q")
        assert code == 2 and 'model was "' in stderr and 'now "idc-breast". Choose' in stderr  # and none of its hashes
        assert [row["slide_id"] for row in rows(tmp_path / "r/slides.csv")] == ["a"]
        assert (
            wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "-q", "--stride", 16, "--force")[0] == 0
        )
        assert digest(tmp_path / "r") != before

    def test_force_starts_only_these_slides_over(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        wsi("score", slides, "-m", model, "-o", tmp_path, "-q")
        before = digest(tmp_path)
        assert wsi("score", slides / "b.svs", "-m", model, "-o", tmp_path, "-q", "--force")[0] == 0
        assert digest(tmp_path) == before and len(rows(tmp_path / "slides.csv")) == 2
        code, _, stderr = wsi("score", slides / "b.svs", "-m", model, "-o", tmp_path, "-q", "--force", "--stride", 16)
        assert code == 2 and "other slides (a)" in stderr and digest(tmp_path) == before

    def test_force_deletes_nothing_but_results(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "thesis.tex").write_text("years of work")
        for more in ((), ("--force",)):
            code, _, stderr = wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path, "-q", *more)
            assert code == 2 and "not results of ours" in stderr
            assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]
            assert not (tmp_path / "run.json").exists()

    def test_from_another_working_directory(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "x.svs").symlink_to(slides / "a.svs")
        monkeypatch.chdir(tmp_path)
        wsi("score", "x.svs", "-m", model, "-o", "r", "-q")
        monkeypatch.chdir(tmp_path / "here")
        code, stdout, _ = wsi("score", "../x.svs", "-m", model, "-o", "../r", "-q", "--json")
        assert code == 0 and len(rows(tmp_path / "r/slides.csv")) == 1
        row = json.loads(stdout)["scored"][0]
        assert isinstance(row["n_tiles"], int) and isinstance(row["mpp"], float)  # also of a resumed slide

    def test_two_runs_on_one_folder_keep_both_rows(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second run starts and ends while the first is between its slide and its table."""
        row, inside = Tables.row, False

        def other_run_first(self: Tables, result: SlideResult) -> dict[str, object]:
            nonlocal inside
            if not inside:
                inside = True
                wsi("score", slides / "b.svs", "-m", model, "-o", tmp_path, "-q")
            return row(self, result)

        monkeypatch.setattr(Tables, "row", other_run_first)
        wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path, "-q")
        assert [row["slide_id"] for row in rows(tmp_path / "slides.csv")] == ["a", "b"]

    def test_a_table_spoilt_by_a_spreadsheet_does_no_harm(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path, "-q")
        table = (tmp_path / "slides.csv").read_text()
        (tmp_path / "slides.csv").write_text("\ufeffcomment;" + table.replace(",", ";"))
        assert wsi("score", slides / "a.svs", "-m", model, "-o", tmp_path, "-q")[0] == 0
        assert (tmp_path / "slides.csv").read_text() == table

    def test_a_lost_table_is_made_again(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        wsi("score", slides, "-m", model, "-o", tmp_path, "-q")
        before = (tmp_path / "slides.csv").read_text()
        (tmp_path / "slides.csv").unlink()
        wsi("score", slides, "-m", model, "-o", tmp_path, "-q")
        assert (tmp_path / "slides.csv").read_text() == before


class TestBadInput:
    def test_one_bad_slide_does_not_end_the_run(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        folder = tmp_path / "mixed"
        folder.mkdir()
        (folder / "a.svs").symlink_to(slides / "a.svs")
        (folder / "letter.svs").write_text("Dear Sir or Madam")
        whole = (slides / "b.svs").read_bytes()
        (folder / "truncated.svs").write_bytes(whole[: len(whole) // 3])
        write_pyramid(folder / "nompp.svs", [section()], None, svs=True)
        write_pyramid(folder / "small.svs", [section(40, 30)], 0.5, svs=True)
        code, _, stderr = wsi("score", folder, "-m", model, "-o", tmp_path / "r", "-q")
        assert code == 3
        assert [row["slide_id"] for row in rows(tmp_path / "r/slides.csv")] == ["a"]
        failures = {row["slide_id"]: row for row in rows(tmp_path / "r/failures.csv")}
        assert set(failures) == {"letter", "truncated", "nompp", "small"}
        assert "not a slide" in failures["letter"]["error"] and failures["letter"]["stage"] == "open"
        assert "--slide-mpp" in failures["nompp"]["remedy"]
        assert "smaller than one tile" in failures["small"]["error"] and failures["small"]["stage"] == "grid"
        assert len(stderr.splitlines()) == 4

    def test_a_slide_that_is_mended_leaves_the_failures(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "late.svs"
        path.write_text("still being copied")
        assert wsi("score", path, "-m", model, "-o", tmp_path / "r", "-q")[0] == 2
        path.write_bytes((slides / "a.svs").read_bytes())
        assert wsi("score", path, "-m", model, "-o", tmp_path / "r", "-q")[0] == 0
        assert rows(tmp_path / "r/failures.csv") == [] and len(rows(tmp_path / "r/slides.csv")) == 1

    def test_wrong_calls(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        cases = [
            (["score", tmp_path / "nothing.svs", "-m", model, "-o", tmp_path / "r"], "no such file"),
            (["score", slides / "a.svs", "-m", "nosuch", "-o", tmp_path / "r"], "no such model"),
            (["score", tmp_path, "-m", model, "-o", tmp_path / "r"], "holds no slides"),
            (["score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "--reader", "paint"], "Known readers"),
            (["score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "--positive", "lymphoma"], "lymphoma"),
            (
                ["score", slides / "a.svs", "-m", model, "-o", tmp_path / "r", "--max-memory", "lots"],
                "--max-memory='lots'",
            ),
            (["info", tmp_path / "nothing.svs"], "no such file"),
        ]
        for arguments, says in cases:
            code, _, stderr = wsi(*arguments)
            assert code == 2 and says in stderr and len(stderr.splitlines()) == 1, arguments
        assert wsi("score")[0] == 2

    def test_microns_that_contradict_the_files_own_are_told(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path
    ) -> None:
        """The file says 0.5: 0.54 is within 10 % of it, 0.25 is not."""
        (slides / "list.csv").write_text("slide,mpp\na.svs,0.54\nb.svs,0.25\n")
        code, _, stderr = wsi("score", slides / "list.csv", "-m", model, "--mil", "none", "-o", tmp_path)
        assert code == 0 and "1 of them flagged" in stderr
        near, far = (json.loads((tmp_path / name / "result.json").read_bytes()) for name in "ab")
        assert near["flags"] == [] == near["warnings"] and far["n_tiles"]
        assert [row["flags"].split()[:1] for row in rows(tmp_path / "slides.csv")] == [[], ["mpp-overridden"]]
        assert "the file says 0.5 x 0.5 microns per pixel, but 0.25 (manifest) was given" in far["warnings"][0]

    def test_manifest(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        (slides / "list.csv").write_text("slide,mpp\na.svs,\nb.svs,0.25\n")
        code, _, _ = wsi("score", slides / "list.csv", "-m", model, "-o", tmp_path / "r", "-q")
        table = rows(tmp_path / "r/slides.csv")
        assert code == 0 and [row["mpp_source"] for row in table] == ["vendor:aperio", "manifest"]
        for text, says in (
            ("path\na.svs\n", "no column 'slide'"),
            ("slide,mpp\na.svs,fine\n", "line 2: mpp is 'fine'"),
            ("slide\na.svs\nz.svs\n", "line 3: there is no slide"),
            ("slide\n", "names no slides"),
            ("slide\n" + "a" * 200_000, "is no CSV"),
            ("slide\n\u00e9".encode("utf-16").decode("latin-1"), "no column"),
        ):
            (slides / "bad.csv").write_text(text)
            code, _, stderr = wsi("score", slides / "bad.csv", "-m", model, "-o", tmp_path / "x")
            assert code == 2 and says in stderr
        (slides / "bad.csv").unlink()
        (slides / "list.csv").unlink()

    def test_same_stem_in_two_folders(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        for case, source in (("one", "a"), ("two", "b")):
            (tmp_path / case).mkdir()
            (tmp_path / case / "slide.svs").write_bytes((slides / f"{source}.svs").read_bytes())
        both = [tmp_path / "one/slide.svs", tmp_path / "two/slide.svs"]
        assert wsi("score", *both, "-m", model, "-o", tmp_path / "r", "-q")[0] == 0
        table = rows(tmp_path / "r/slides.csv")
        assert len({row["slide_id"] for row in table}) == 2 and {row["slide"] for row in table} == set(map(str, both))
        # one after the other into the same folder: the second must not overwrite the first
        for path in both:
            assert wsi("score", path, "-m", model, "-o", tmp_path / "s", "-q")[0] == 0
        assert {row["slide"] for row in rows(tmp_path / "s/slides.csv")} == set(map(str, both))

    def test_no_tissue_is_a_warning(self, wsi: Run, model: Path, tmp_path: Path) -> None:
        blank = np.clip(np.random.default_rng(0).normal(243, 2, (600, 800, 3)), 0, 255).astype(np.uint8)
        write_pyramid(tmp_path / "blank.svs", [blank], 0.5, svs=True)
        code, _, _ = wsi("score", tmp_path / "blank.svs", "-m", model, "-o", tmp_path / "r", "-q")
        row = rows(tmp_path / "r/slides.csv")[0]
        assert (
            wsi("score", tmp_path / "blank.svs", "-m", model, "-o", tmp_path / "s", "-q", "--stain", "macenko")[0] == 0
        )
        assert rows(tmp_path / "s/slides.csv")[0]["flags"] == "no-tissue stain-fallback"
        assert PatchStore.open(tmp_path / "s/blank/store.zarr").attributes["stain"]["fallback"] == "blank"
        assert code == 0 and row["flags"] == "no-tissue" and row["n_tiles"] == "0"
        assert row["grade"] == row["positive_mm2"] == row["prob_tumour"] == ""
        result = json.loads((tmp_path / "r/blank/result.json").read_text())
        assert result["reasons"]["grade"] == "no tissue" and result["warnings"]
        assert json.loads((tmp_path / "r/blank/regions.geojson").read_text())["features"] == []
        assert wsi("score", tmp_path / "blank.svs", "-m", model, "-o", tmp_path / "r", "-q")[0] == 0
        write_pyramid(tmp_path / "dark.svs", [255 - blank], 0.5, svs=True)
        assert wsi("score", tmp_path / "dark.svs", "-m", model, "-o", tmp_path / "d", "-q")[0] == 0
        (said,) = json.loads((tmp_path / "d/dark/result.json").read_text())["warnings"]
        assert "fluorescence" in said and "--min-tissue" not in said

    def test_damage_is_counted_and_never_scored(self, wsi: Run, model: Path, tmp_path: Path) -> None:
        """One stored tile inside the tissue is damaged, in the level that patches are cut from."""
        full = section(2048, 1536)
        path = write_jpeg_pyramid(tmp_path / "a.tif", [full, halved(full)], tile=64)
        whole = wsi("score", path, "-m", model, "-o", tmp_path / "whole", "-q")
        spoil(path, 6 * 16 + 8, page=1)  # row 6, column 8
        code, _, _ = wsi("score", path, "-m", model, "-o", tmp_path / "r", "-q", "--max-unreadable", 0.02)
        assert whole[0] == code == 0
        good, store = (PatchStore.open(tmp_path / name / "a/store.zarr") for name in ("whole", "r"))
        result = json.loads((tmp_path / "r/a/result.json").read_text())
        unreadable, boxes = store.get("unreadable"), store.grid.boxes()
        tile = Box(8 * 128, 6 * 128, 128, 128)  # level-0 pixels
        touches = np.array([min(box) > 0 for box in (Box(*b).intersect(tile)[2:] for b in boxes.tolist())])
        np.testing.assert_array_equal(unreadable, touches)
        assert 0 < touches.sum() == result["n_unreadable"] and "unreadable-tiles" in result["flags"]
        assert 0 < result["unreadable_tissue"] < 0.02
        for name in ("probabilities", "features"):
            assert np.isnan(store.get(name)[unreadable]).all()
            np.testing.assert_array_equal(store.get(name)[~unreadable], good.get(name)[~unreadable])
        assert np.isnan(store.get("attention")[unreadable]).all() and store.get("attention")[~unreadable].sum() > 0.99
        with gzip.open(tmp_path / "r/a/tiles.geojson.gz", "rt") as file:
            assert len(json.load(file)["features"]) == len(store) - touches.sum() == result["n_tiles"]

        strict = ("score", path, "-m", model, "-o", tmp_path / "s", "-q")
        code, _, stderr = wsi(*strict, "--max-unreadable", 0.001)
        failure = rows(tmp_path / "s/failures.csv")[0]
        assert code == 2 and "of its tissue cannot be decoded" in stderr and "--max-unreadable" in failure["remedy"]
        assert wsi(*strict, "--max-unreadable", 0.02)[0] == 0  # the remedy, in the same folder
        np.testing.assert_array_equal(PatchStore.open(tmp_path / "s/a/store.zarr").get("unreadable"), unreadable)

    def test_damage_in_the_overview_hides_no_tissue(self, wsi: Run, model: Path, tmp_path: Path) -> None:
        """The level that tissue is looked for in is damaged: a finer one is asked."""
        full = section(2048, 1536)
        path = write_jpeg_pyramid(tmp_path / "a.tif", [full, halved(full), halved(halved(full))], tile=64)
        assert wsi("score", path, "-m", model, "-o", tmp_path / "whole", "-q")[0] == 0
        spoil(path, *range(10, 30), page=2)
        assert wsi("score", path, "-m", model, "-o", tmp_path / "r", "-q")[0] == 0
        good, found = (json.loads((tmp_path / name / "a/result.json").read_text()) for name in ("whole", "r"))
        assert found["n_unreadable"] == 0 and abs(found["n_tiles"] - good["n_tiles"]) <= 3
        assert found["tissue_mm2"] == pytest.approx(good["tissue_mm2"], rel=0.02)

    def test_lost_tissue_is_counted_where_nothing_else_shows_it(self, wsi: Run, model: Path, tmp_path: Path) -> None:
        """One level, a quarter of it damaged: that may have been tissue, and is not glass."""
        path = write_jpeg_pyramid(tmp_path / "a.tif", [section(1024, 768)], tile=64, mpp=1.0)
        spoil(path, *(row * 16 + column for row in range(3, 9) for column in range(4, 12)))
        code, _, stderr = wsi("score", path, "-m", model, "-o", tmp_path / "r", "-q")
        assert code == 2 and "of its tissue cannot be decoded" in stderr

    def test_damage_without_tissue(self, wsi: Run, model: Path, tmp_path: Path) -> None:
        blank = np.clip(np.random.default_rng(0).normal(243, 2, (768, 1024, 3)), 0, 255).astype(np.uint8)
        path = write_jpeg_pyramid(tmp_path / "a.tif", [blank], tile=64, mpp=1.0)
        spoil(path, 50)
        common = ("score", path, "-m", model, "-q", "--min-tissue", 0)
        assert wsi(*common, "-o", tmp_path / "r")[0] == 2
        assert wsi(*common, "-o", tmp_path / "s", "--max-unreadable", 1)[0] == 0
        json.loads((tmp_path / "s/a/result.json").read_text(), parse_constant=pytest.fail)

    def test_a_coarse_slide_is_flagged(self, wsi: Run, model: Path, tmp_path: Path) -> None:
        write_pyramid(tmp_path / "coarse.svs", [section(200, 150)], 4.0, svs=True)
        wsi("score", tmp_path / "coarse.svs", "-m", model, "--mil", "none", "-o", tmp_path / "r", "-q")
        assert rows(tmp_path / "r/slides.csv")[0]["flags"] == "upsampled"

    def test_nowhere_to_write(self, wsi: Run, slides: Path, model: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for out in (tmp_path / "file", tmp_path / "file/r"):
            code, _, stderr = wsi("score", slides / "a.svs", "-m", model, "-o", out, "-q")
            assert code == 2 and "cannot be written" in stderr and "-o" in stderr
        code, _, stderr = wsi("score", slides / "a.svs", "-m", model, "-o", slides, "-q")
        assert code == 2 and "not results of ours" in stderr

    @pytest.mark.parametrize(("code", "after"), [(errno.ENOSPC, 12), (errno.ENOSPC, 19), (errno.EACCES, 3)])
    def test_a_full_disk_loses_nothing(
        self, wsi: Run, slides: Path, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        code: int, after: int,
    ) -> None:  # fmt: skip
        replace, count = os.replace, 0

        def full(source: str, target: str) -> None:
            nonlocal count
            count += 1
            if count > after:
                raise OSError(code, os.strerror(code), str(target))
            replace(source, target)

        arguments = ("score", slides / "b.svs", "-m", model, "-o", tmp_path, "-q", "--stride", STRIDE)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            patched.setattr(Path, "replace", full)
            status, _, stderr = wsi(*arguments)
        assert status == 2 and os.strerror(code) in stderr and len(stderr.splitlines()) == 1
        kept = {name: sha for name, sha in digest(tmp_path).items() if "/." not in f"/{name}"}
        assert kept.items() <= digest(whole).items()
        assert wsi(*arguments)[0] == 0
        assert digest(tmp_path) == digest(whole)

    def test_a_bug_shows_its_traceback_and_the_rest_go_on(
        self, wsi: Run, slides: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        score_slide = run.score_slide

        def sometimes(path: str, *arguments: object, **more: object) -> object:
            if path.endswith("a.svs"):
                raise ZeroDivisionError("oops")
            return score_slide(path, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(run, "score_slide", sometimes)
        code, _, stderr = wsi("score", slides, "-m", model, "-o", tmp_path, "-q")
        assert code == 3 and "Traceback" in stderr
        assert rows(tmp_path / "failures.csv")[0]["error"] == "ZeroDivisionError: oops"
        assert len(rows(tmp_path / "slides.csv")) == 1


def test_a_device_that_there_is_not_is_refused(wsi: Run, slides: Path, tmp_path: Path) -> None:
    code, _, stderr = wsi("score", slides, "-m", "phantom", "--device", "gpu", "-o", tmp_path / "none")
    assert code == 2 and "no such device" in stderr and "cuda" in stderr


class TestOtherVerbs:
    def test_info(self, wsi: Run, slides: Path) -> None:
        code, stdout, _ = wsi("info", slides / "a.svs", "--json")
        facts = json.loads(stdout)
        assert code == 0 and facts["size_px"] == [900, 700] and facts["mpp"] == [0.5, 0.5]
        assert [level["size_px"] for level in facts["levels"]] == [[900, 700], [450, 350]]
        code, stdout, _ = wsi("info", slides / "a.svs")
        assert "900 x 700 px" in stdout and "vendor:aperio" in stdout

    def test_a_name_that_is_not_utf_8_can_be_printed(self, wsi: Run, slides: Path, tmp_path: Path) -> None:
        try:
            odd = shutil.copy(slides / "a.svs", os.fsdecode(bytes(tmp_path) + b"/\xff.svs"))
        except OSError as error:
            if error.errno != errno.EILSEQ:
                raise
            pytest.skip(
                "the file system of the temporary folder takes no names but UTF-8 (APFS): no slide can have one"
            )
        for verb in ("info", "check"):
            code, stdout, _ = wsi(verb, odd)
            assert code == 0 and r"\udcff.svs" in stdout

    def test_doctor(self, wsi: Run) -> None:
        code, stdout, _ = wsi("doctor", "--json")
        facts = json.loads(stdout)
        assert code == 0 and facts["problems"] == [] and facts["openslide library"] >= "4.0.1"
        plain = subprocess.run([sys.executable, "-c", "import timm"], capture_output=True, check=False)
        assert facts["torchvision fits torch"].startswith("yes" if plain.returncode == 0 else "no: wsi mends it")
        assert wsi("doctor")[1].endswith("all well\n")

    def test_help_is_fast_and_loads_nothing_heavy(self) -> None:
        code = (
            "import sys; sys.argv = ['wsi', '--help']\n"
            "from wsi.cli import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'timm', 'zarr', 'dask', 'openslide', 'tiffslide', 'numpy', 'matplotlib', 'skimage'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for verb in ("score", "tile", "info", "demo", "doctor"):
            assert verb in done.stdout

    def test_every_verb_shows_an_example(self, wsi: Run) -> None:
        for verb in ("score", "tile", "info", "demo", "doctor"):
            code, stdout, _ = wsi(verb, "--help")
            assert code == 0 and f"wsi {verb}" in stdout.split("Example")[1]

    def test_help_keeps_the_names_of_extras(self, wsi: Run) -> None:
        """Square brackets are markup to the printer of help: `wsi[cluster]` came out as `wsi`."""
        assert "extra cluster" in " ".join(wsi("score", "--help")[1].replace("│", " ").split())


def test_ink_is_scored_on_request(wsi: Run, model: Path, tmp_path: Path) -> None:
    rgb = np.full((600, 800, 3), 243, np.uint8)
    rgb[100:500, 200:600] = (45, 85, 185)
    write_pyramid(tmp_path / "blue.svs", [rgb], 1.0, svs=True)
    for name, options, found in (("a", (), False), ("b", ("--keep-pen",), True)):
        assert wsi("score", tmp_path / "blue.svs", "-m", model, *options, "-o", tmp_path / name, "-q")[0] == 0
        assert (float(rows(tmp_path / name / "slides.csv")[0]["tissue_mm2"]) > 0.15) == found
