"""The programs that `archive.py` compares, each run in a process of its own: ``python scorers.py PROGRAM JOB``.

JOB is a ``Job`` as JSON. Here is how each program is called, and how what it wrote is read again.
"""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TILE_PX, MPP, SLIDE_MPP = 224, 0.5, 0.25
MEAN, STD = [0.7, 0.55, 0.7], [0.2, 0.2, 0.2]
CLASSES = ["no", "yes"]
#: What a program said of tiles: corner in level-0 pixels (slide, x, y) to the probability of "yes".
Scores = dict[tuple[str, int, int], float]


@dataclass(frozen=True)
class Job:
    """What to score, with what, where to; `tiles` is what ``archive.write_tiles`` wrote. Paths are strings for JSON."""

    slides: str
    model: str
    tiles: str
    out: str
    batch: int
    workers: int

    def paths(self) -> list[Path]:
        """Slides, in order."""
        return sorted(Path(self.slides).iterdir())


@dataclass(frozen=True)
class Program:
    """How to run a program, and to read its results."""

    package: str
    run: Callable[[Job], None]
    read: Callable[[Job], Iterator[tuple[tuple[str, int, int], float]]]


def wsi(precision: str) -> Program:
    """Ours finds its tissue itself: the others are given what it finds."""

    def run(job: Job) -> None:
        from wsi import EngineConfig, find_slides, score_archive
        from wsi.archive import default_threads

        engine = EngineConfig(
            job.model, device="cpu", precision=precision, batch_size=job.batch, threads=default_threads()
        )
        summary = score_archive(find_slides([job.slides]), job.out, engine)
        if summary.failed:
            raise RuntimeError(f"{summary.failed[0]}")

    def read(job: Job) -> Iterator[tuple[tuple[str, int, int], float]]:
        from wsi import PatchStore

        for path in sorted(Path(job.out).glob("*/store.zarr")):
            store = PatchStore.open(path)
            for (x, y, *_), p in zip(store.grid.boxes(), store.get("probabilities")[:, 1], strict=True):
                yield (path.parent.name, round(x), round(y)), float(p)

    return Program("wsi", run, read)


def wsinfer(*more: str) -> Program:
    """``wsinfer run``, which takes patches that lie where it would write them."""

    def run(job: Job) -> None:
        _mend_torchvision()
        import wsinfer_zoo.client
        import zarr.storage

        # Its import wants a class of Zarr 2, for slides through tiffslide (ours go through OpenSlide); and the list of
        # its zoo's models, from the network, to say which ones --model knows.
        zarr.storage.KVStore = type("KVStore", (dict,), {})
        wsinfer_zoo.client.load_registry = lambda: wsinfer_zoo.client.ModelRegistry({})
        from wsinfer.cli.cli import cli

        for name, suffix in (("patches", "h5"), ("masks", "jpg")):
            (Path(job.out) / name).mkdir(parents=True)
            for slide in job.paths():
                shutil.copy(Path(job.tiles) / f"{slide.stem}.{suffix}", Path(job.out) / name)
        model = ["--config", f"{job.model}/config.json", "--model-path", f"{job.model}/torchscript_model.pt"]
        work = ["--batch-size", str(job.batch), "--num-workers", str(job.workers)]
        cli(["run", "-i", job.slides, "-o", job.out, *model, *work, *more], standalone_mode=False)

    def read(job: Job) -> Iterator[tuple[tuple[str, int, int], float]]:
        for path in sorted(Path(job.out).glob("model-outputs-csv/*.csv")):
            with path.open() as file:
                for row in csv.DictReader(file):
                    yield (path.stem, int(row["minx"]), int(row["miny"])), float(row[f"prob_{CLASSES[1]}"])

    return Program("wsinfer", run, read)


def tiatoolbox(*, parallel: bool) -> Program:
    """Its PatchPredictor, with masks. The network normalises its input: by batches, which is faster than by patches."""

    def run(job: Job) -> None:
        _mend_torchvision()
        import timm
        import torch
        from safetensors.torch import load_file
        from tiatoolbox.models.architecture.vanilla import CNNModel
        from tiatoolbox.models.engine.io_config import IOPatchPredictorConfig
        from tiatoolbox.models.engine.patch_predictor import PatchPredictor
        from tiatoolbox.models.models_abc import ModelABC

        class Net(ModelABC):
            infer_batch = staticmethod(CNNModel.infer_batch)
            postproc = staticmethod(CNNModel.postproc)

            def __init__(self) -> None:
                super().__init__()
                config = json.loads((Path(job.model) / "config.json").read_text())
                self.net = timm.create_model(config["architecture"], num_classes=len(CLASSES))
                self.load_state_dict(load_file(Path(job.model) / "weights.safetensors"))
                self.mean, self.std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

            def forward(self, x: Any) -> Any:
                return self.net((x - self.mean) / self.std).softmax(1)

        predictor = PatchPredictor(Net(), batch_size=job.batch, num_workers=job.workers if parallel else 0)
        side, at = (TILE_PX, TILE_PX), [{"units": "mpp", "resolution": MPP}]
        config = IOPatchPredictorConfig(
            input_resolutions=at, output_resolutions=[], patch_input_shape=side, stride_shape=side
        )
        masks = [Path(job.tiles) / f"{slide.stem}.png" for slide in job.paths()]
        predictor.run(
            job.paths(), masks=masks, patch_mode=False, ioconfig=config, save_dir=Path(job.out), output_type="zarr",
            return_probabilities=True,
        )  # fmt: skip

    def read(job: Job) -> Iterator[tuple[tuple[str, int, int], float]]:
        import zarr

        for path in sorted(Path(job.out).glob("*.zarr")):
            group = zarr.open_group(path, mode="r")
            for (x, y, *_), p in zip(group["coordinates"][:], group["probabilities"][:, 1], strict=True):
                scale = MPP / SLIDE_MPP  # it writes coordinates at the resolution it read
                yield (path.stem, round(x * scale), round(y * scale)), float(p)

    return Program("tiatoolbox", run, read)


def _mend_torchvision() -> None:
    """Import torchvision where its build does not fit torch's: as ``wsi.nn.backbone``, whose timm not all need."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torchvision: Any = importlib.import_module("torchvision")
        torchvision.kept_alive = library  # its operators vanish with it


PROGRAMS = {
    "wsi, float32": wsi("float32"),
    "wsi, bfloat16": wsi("bfloat16"),
    "wsinfer": wsinfer(),
    "wsinfer --speedup": wsinfer("--speedup"),
    "tiatoolbox": tiatoolbox(parallel=False),
    "tiatoolbox, workers": tiatoolbox(parallel=True),
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]].run(Job(**json.loads(sys.argv[2])))
