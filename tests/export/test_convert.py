"""From one program's layout to another's: what comes is what an export writes, and the way back is exact."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from tests.conftest import Run
from tests.export.make import marked_results
from wsi.check import check
from wsi.errors import TrainError
from wsi.export.bags import export_bags
from wsi.export.convert import Given, convert_bags, lattice
from wsi.grid import TileGrid
from wsi.store import PatchStore
from wsi.units import Mpp

LAYOUTS = ("clam", "trident", "stamp", "torchmil", "anndata")
PAIRS = list(itertools.permutations(LAYOUTS, 2))
GRIDS = [(0.25, 0.5, None), (0.2431, 0.5, None), (0.2431, 0.5, 48), (0.25, 1.0, 32)]
#: The only things that a program's files do not say, of a slide at 0.25 um with tiles of 64 px at 0.5 um.
LACKS = {"clam": {"encoder", "mpp", "tile_px"}, "trident": {"mpp"}, "torchmil": {"encoder", "mpp", "tile_px"}}
KNOWN = {"encoder": "red", "mpp": 0.25, "tile_px": 64}


def raw(folder: Path) -> dict[str, np.ndarray]:
    """Every array in a layout's files by file and name, and their attributes, without our readers."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".npy":
            found[name] = np.load(file)
        elif file.suffix == ".pt":
            found[name] = torch.load(file).numpy()
        else:
            with h5py.File(file) as opened:
                nodes: list[str] = []
                opened.visit(nodes.append)
                for at in nodes:
                    found |= {f"{name}/{at}@{key}": np.asarray(value) for key, value in opened[at].attrs.items()}
                    if isinstance(opened[at], h5py.Dataset):
                        found[f"{name}/{at}"] = np.asarray(opened[at])
                found |= {f"{name}@{at}": np.asarray(value) for at, value in opened.attrs.items()}
    return found


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_comes_is_what_an_export_writes(tmp_path: Path, source: str, target: str):
    marked_results(tmp_path / "r", features=8, unreadable=(3,))
    export_bags(tmp_path / "r", tmp_path / source, source)
    export_bags(tmp_path / "r", tmp_path / "expected", target)
    given = Given(**{what: KNOWN[what] for what in LACKS.get(source, ())})
    if source == "torchmil":
        given = Given(**KNOWN, tile_level0=128)
    (row,) = convert_bags([tmp_path / source], tmp_path / "out", target, given)
    assert (row["slide_id"], row["tile_level0"], row["stride_level0"], row["warnings"]) == ("a", 128, 128, [])
    found, expected = raw(tmp_path / "out"), raw(tmp_path / "expected")
    lost = expected.keys() - found.keys()
    # Only the slide's size, where the source has none; and of AnnData the scores.
    assert all("dim" in name or "size_px" in name or "/obs" in name for name in lost), lost
    compared = 0
    for name, value in found.items():
        if "/obs" in name or "level0_width" in name or "level0_height" in name:
            continue
        compared += 1
        if value.dtype.kind == "f":
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-9, err_msg=name)
        else:
            assert np.array_equal(value, expected[name]), name
    assert compared >= 2


@pytest.mark.parametrize(("mpp", "tile_mpp", "stride"), GRIDS)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back_gives_the_same_arrays(tmp_path: Path, source: str, target: str, mpp, tile_mpp, stride):
    made = marked_results(
        tmp_path / "r", mpp=mpp, tile_mpp=tile_mpp, stride_px=stride, features=4, unreadable=(0, 1, 2, 3)
    )
    export_bags(tmp_path / "r", tmp_path / "a", source)
    before = raw(tmp_path / "a")
    given = Given(encoder="red", mpp=mpp, tile_px=64, tile_level0=made.grid.tile[0], stride_level0=made.grid.stride[0])
    convert_bags([tmp_path / "a"], tmp_path / "b", target, given)
    convert_bags([tmp_path / "b"], tmp_path / "c", source, given)
    after = raw(tmp_path / "c")
    for name in (each for each in before if "@" not in each and "/obs" not in each and "/uns" not in each):
        there = after[name]
        if "coords" in name or "spatial" in name:
            rounded = target in ("clam", "trident")  # these programs have whole pixels
            most = 0.5001 * (mpp if source == "stamp" else 1) if rounded and there.dtype.kind == "f" else 1e-6
            assert np.abs(there - before[name]).max() <= most, name
        else:
            assert there.dtype == before[name].dtype and np.array_equal(there, before[name]), name


def test_a_lattice_is_found_whatever_was_rounded():
    """Against the grid itself: strides that are no whole pixels, gaps, a far corner; and none where there is none."""
    rng = np.random.default_rng(0)
    for mpp, stride_px in ((0.2431, 256), (0.25, 224), (0.4932, 100), (0.17, 512)):
        grid = TileGrid.cover((60_000, 40_000), slide_mpp=Mpp(mpp, mpp), mpp=0.5, tile_px=256, stride_px=stride_px)
        for share in (0.6, 0.05):
            grid_of = grid.keep(np.flatnonzero(rng.random(len(grid)) < share))
            grid_of = grid_of.keep(grid_of.columns > grid.columns.max() // 3)
            corners = np.rint(grid_of.boxes()[:, :2])
            found = lattice(corners, 10)
            assert found is not None
            positions, stride = found
            assert np.array_equal(np.rint(positions * stride), corners), "the way back is exact"
            assert np.allclose(stride, grid.stride, atol=0.02)
            assert np.array_equal(positions, np.stack([grid_of.columns, grid_of.rows], axis=1))
    apart = np.array([[0, 0], [256, 0], [512, 0], [100, 256], [356, 256]], float)
    assert lattice(apart, 32) is None, "contours of CLAM have lattices of their own"
    assert lattice(apart[:1], 32) is None
    elsewhere = apart[:3] + np.array([130, 0])
    positions, stride = lattice(elsewhere, 32) or ((), 0)
    assert positions[0][0] == 130 / 256 and np.array_equal(positions * stride, elsewhere)
    two = np.array([[200.0, 0], [712, 0]])  # of which a lattice from the corner would be 712 apart
    positions, stride = lattice(two, 32) or ((), 0)
    assert stride[0] == 512 and np.diff(positions, axis=0).tolist() == [[1, 0]]


def clam(folder: Path, coords: np.ndarray, *, width: int = 3, name: str = "a", patches: bool = True, **attrs) -> Path:
    """Write a slide as CLAM does: features and coordinates, and coordinates with the size of patches."""
    for sub in ("h5_files", "patches"):
        if sub == "patches" and not patches:
            continue
        (folder / sub).mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / sub / f"{name}.h5", "w") as file:
            file["coords"] = coords
            if sub == "patches":
                file["coords"].attrs.update({"patch_size": 256, "patch_level": 0, **attrs})
            else:
                file["features"] = np.random.default_rng(0).normal(size=(len(coords), width)).astype(np.float32)
    return folder


def test_contours_with_lattices_of_their_own(tmp_path: Path):
    """CLAM begins each contour where its box begins: torchmil gets fractional positions, neighbours still 1 apart."""
    coords = np.array([[0, 0], [256, 0], [0, 256], [1000, 117], [1256, 117]])
    folder = clam(tmp_path / "c", coords)
    with pytest.raises(TrainError, match=r"not lie on a lattice.*--stride-level0"):
        convert_bags([folder], tmp_path / "out", "torchmil")
    assert not list(tmp_path.glob("*out*")), "nothing half-written is left"
    (row,) = convert_bags([folder], tmp_path / "out", "torchmil", Given(stride_level0=256))
    assert "not whole" in row["warnings"][0]
    np.testing.assert_array_equal(np.load(tmp_path / "out/coords/a.npy") * 256, coords)
    convert_bags([tmp_path / "out"], tmp_path / "back", "clam", Given(stride_level0=256))
    assert np.array_equal(raw(tmp_path / "back")["h5_files/a.h5/coords"], coords)


def test_patches_of_a_lower_level_are_as_large_as_they_are(tmp_path: Path):
    coords = np.array([[0, 0], [1024, 0], [0, 1024]])
    folder = clam(tmp_path / "c", coords, patch_level=1, downsample=(4.0, 4.0), level_dim=(3000, 2000))
    convert_bags([folder], tmp_path / "out", "stamp", Given("uni", mpp=0.25, tile_px=256))
    with h5py.File(tmp_path / "out/uni/a.h5") as file:
        assert file.attrs["tile_size_um"] == 256.0 and np.array_equal(file["coords"], coords * 0.25)


def test_of_tensors_alone_coordinates_are_taken_from_the_patches(tmp_path: Path):
    folder = clam(tmp_path / "c", np.array([[0, 0], [256, 0]]))
    x = torch.ones(2, 3)
    (folder / "pt_files").mkdir()
    torch.save(x, folder / "pt_files/a.pt")
    (folder / "h5_files/a.h5").unlink()
    (folder / "h5_files").rmdir()
    convert_bags([folder], tmp_path / "out", "torchmil")
    assert np.array_equal(np.load(tmp_path / "out/coords/a.npy"), [[0, 0], [1, 0]])
    torch.save(x[:1], folder / "pt_files/a.pt")
    with pytest.raises(TrainError, match="1 features and 2 coordinates"):
        convert_bags([folder], tmp_path / "out2", "torchmil")


def test_stamps_own_files_count_in_microns(tmp_path: Path):
    (tmp_path / "s").mkdir()
    with h5py.File(tmp_path / "s/a.h5", "w") as file:
        file["coords"], file["feats"] = np.array([[0, 0], [256.0, 0], [0, 512.0]]), np.ones((3, 2), np.float16)
        file.attrs.update({"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "chief-ctranspath"})
    with pytest.raises(TrainError, match="--slide-mpp"):
        convert_bags([tmp_path / "s"], tmp_path / "out", "clam")
    convert_bags([tmp_path / "s"], tmp_path / "out", "trident", Given(mpp=0.5))
    found = raw(tmp_path / "out")
    at = "8.75x_224px_0px_overlap/features_chief-ctranspath/a.h5/coords"
    assert np.array_equal(found[at], [[0, 0], [512, 0], [0, 1024]]) and found[f"{at}@patch_size_level0"] == 512


def test_stores_are_sources_too(tmp_path: Path):
    """Features of an encoder beside those of the scoring model: named, and as they are."""
    marked_results(tmp_path / "r", features=4)
    store = PatchStore.open(tmp_path / "r/a/store.zarr")
    store.add("features-b", (3,), "float16", {"encoder": "MahmoodLab/UNI", "encoder_sha256": "b" * 64})
    values = np.random.default_rng(0).normal(size=(len(store), 3)).astype(np.float16)
    store.put("features-b", values)
    with pytest.raises(TrainError, match="--encoder"):
        convert_bags([tmp_path / "r"], tmp_path / "out", "trident")
    convert_bags([tmp_path / "r"], tmp_path / "scored", "stamp", Given(encoder="f" * 12))
    assert [each.name for each in (tmp_path / "scored").iterdir()] == ["red"], "as its result.json calls the model"
    convert_bags([tmp_path / "r"], tmp_path / "out", "trident", Given(encoder="MahmoodLab/UNI"))
    assert np.array_equal(raw(tmp_path / "out")["20x_64px_0px_overlap/features_UNI/a.h5/features"], values)


def test_tiles_that_lie_apart_overlap_by_less_than_nothing(tmp_path: Path):
    """TRIDENT's own arithmetic is a step of patch less overlap; its reader takes coordinates, and shows the number."""
    made = marked_results(tmp_path / "r", stride_px=128, features=4)
    export_bags(tmp_path / "r", tmp_path / "expected", "torchmil")
    export_bags(tmp_path / "r", tmp_path / "job", "trident")
    (folder,) = (tmp_path / "job").iterdir()
    with h5py.File(folder / "patches/a_patches.h5") as file:
        about = dict(file["coords"].attrs)
        corners = file["coords"][:]
    assert folder.name == "20x_64px_-64px_overlap" and about["overlap"] == -64
    step = (about["patch_size"] - about["overlap"]) * about["level0_magnification"] / about["target_magnification"]
    assert np.array_equal(corners // step, np.stack([made.grid.columns, made.grid.rows], axis=1))
    (row,) = convert_bags([tmp_path / "job"], tmp_path / "out", "torchmil")
    assert row["stride_level0"] == 256 and np.array_equal(
        *(np.load(tmp_path / n / "coords/a.npy") for n in ("out", "expected"))
    )


def test_pseudonyms_are_those_of_exports(tmp_path: Path, wsi: Run):
    marked_results(tmp_path / "r", "Doe_John", features=4)
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    export_bags(tmp_path / "r", tmp_path / "named", "clam")
    for target in ("clam", "trident", "stamp", "torchmil", "anndata"):
        for source in ("named", "r"):
            options = ("--encoder", "red", "--slide-mpp", 0.25, "--tile-px", 64) if source == "named" else ()
            out = tmp_path / f"{target}_{source}"
            assert wsi("convert", tmp_path / source, "--to", target, "-o", out, "--pseudonymise", key, *options)[0] == 0
            export_bags(tmp_path / "r", tmp_path / target, target, key=key.read_bytes())
            files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
            assert files and all((tmp_path / target / file).is_file() for file in files)
            for file in files:
                assert "Doe" not in str(file) and b"Doe" not in (out / file).read_bytes()


@pytest.mark.parametrize("target", ["clam", "trident"])
def test_of_wsinfer_the_coordinates(tmp_path: Path, target: str):
    made = marked_results(tmp_path / "r", mpp=0.2431, features=4)
    export_bags(tmp_path / "r", tmp_path / "wsinfer", "wsinfer")
    export_bags(tmp_path / "r", tmp_path / "expected", target)
    convert_bags(
        [tmp_path / "wsinfer"], tmp_path / "out", target, Given(mpp=0.2431, tile_px=64, tile_level0=made.grid.tile[0])
    )
    found, expected = raw(tmp_path / "out"), raw(tmp_path / "expected")
    files = {name for name in found if name.endswith("coords")}
    assert len(files) == 1 and "patches" in next(iter(files))
    assert all(np.array_equal(found[name], expected[name]) for name in files)
    with pytest.raises(TrainError, match="no features"):
        convert_bags([tmp_path / "wsinfer"], tmp_path / "out2", "torchmil")
    assert check(tmp_path / "wsinfer").facts["classes"] == ["stroma", "tumour"]


class TestBadInput:
    def test_what_belongs_apart(self, tmp_path: Path) -> None:
        coords = np.array([[0, 0], [256, 0]])
        clam(clam(tmp_path / "c", coords), coords, width=4, name="b")
        with pytest.raises(TrainError, match="features of width 4; a has 3"):
            convert_bags([tmp_path / "c"], tmp_path / "out", "torchmil")
        one, two = clam(tmp_path / "1", coords), clam(tmp_path / "2", coords)
        with pytest.raises(TrainError, match="is also in"):
            convert_bags([one, two], tmp_path / "out", "torchmil")
        assert not list(tmp_path.glob("*out*"))

    def test_what_is_not_said(self, tmp_path: Path) -> None:
        bare = clam(tmp_path / "c", np.array([[0, 0], [256, 0], [0, 256]]), patches=False)
        for given, asked in (
            ({}, r"tile-level0, name it with --encoder, give .*tile-px, give .*slide-mpp$"),
            ({"tile_level0": 256}, r"encoder, give .*tile-px, give .*slide-mpp"),
            ({"tile_level0": 256, "encoder": "uni", "mpp": 0.5}, r"cut\. Give them with --tile-px$"),
        ):
            with pytest.raises(TrainError, match=asked):
                convert_bags([bare], tmp_path / "out", "trident", Given(**given))
        (tmp_path / "n/features").mkdir(parents=True)
        (tmp_path / "n/coords").mkdir()
        np.save(tmp_path / "n/features/a.npy", np.ones((2, 3), np.float32))
        np.save(tmp_path / "n/coords/a.npy", np.array([[0, 0], [1, 0]]))
        with pytest.raises(TrainError, match=r"tile-level0, name it with --encoder, give .*tile-px, give .*slide-mpp$"):
            convert_bags([tmp_path / "n"], tmp_path / "out", "stamp")
        with h5py.File(tmp_path / "s.h5", "w") as file:
            file["coords"], file["feats"] = np.array([[0.0, 0], [900, 0], [1250, 0]]), np.ones((3, 2), np.float16)
            file.attrs.update({"unit": "um", "tile_size_um": 900.0})
        with pytest.raises(TrainError, match=r"slide-mpp, name it with --encoder, give .*stride-level0, .*tile-px$"):
            convert_bags([tmp_path / "s.h5"], tmp_path / "out", "trident")
        torch.save(torch.ones(2, 3), tmp_path / "a.pt")
        with pytest.raises(TrainError, match="no coordinates"):
            convert_bags([tmp_path / "a.pt"], tmp_path / "out", "torchmil")
        with pytest.raises(TrainError, match=r"says \(256.0, 256.0\) level-0 pixels a tile, and --tile-level0"):
            convert_bags([clam(bare, np.array([[0, 0]]))], tmp_path / "out", "clam", Given(tile_level0=512))
        with pytest.raises(ValueError, match="mpp must be positive"):
            Given(mpp=0.0)

    def test_what_float16_cannot_hold(self, tmp_path: Path) -> None:
        folder = clam(tmp_path / "c", np.array([[0, 0]]))
        with h5py.File(folder / "h5_files/a.h5", "a") as file:
            file["features"][0, 0] = 7e4
        with pytest.raises(TrainError, match="float16"):
            convert_bags([folder], tmp_path / "out", "stamp", Given("uni", mpp=0.25, tile_px=256))

    def test_from_the_command_line(self, tmp_path: Path, wsi: Run) -> None:
        folder = clam(tmp_path / "c", np.array([[0, 0], [256, 0]]))
        code, out, _ = wsi("convert", folder, "--to", "torchmil", "-o", tmp_path / "out", "--json")
        assert code == 0 and json.loads(out)[0]["stride_level0"] == 256
        for arguments, said in (
            ((folder, "--to", "torchmil", "-o", tmp_path / "out"), "is there already"),
            ((folder, "--to", "zip", "-o", tmp_path / "new"), "must be one of clam"),
            ((tmp_path / "nowhere", "--to", "clam", "-o", tmp_path / "new"), "no such file"),
            ((tmp_path, "--to", "clam", "-o", tmp_path / "new"), "holds no bags"),
            ((folder, "--to", "clam", "--slide-mpp", "-1", "-o", tmp_path / "new"), "must be positive"),
            ((folder, "--to", "clam", "-o", tmp_path / "c/h5_files/a.h5/new"), "cannot be written"),
        ):
            code, _, err = wsi("convert", *arguments)
            assert code == 2 and said in err, err
        (tmp_path / "csv").mkdir()
        (tmp_path / "csv/a.csv").write_text("minx,miny\n1,2\n")
        assert "WSInfer" in wsi("convert", tmp_path / "csv/a.csv", "--to", "clam", "-o", tmp_path / "new")[2]
        assert not (tmp_path / "new").exists()
