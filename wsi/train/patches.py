"""Training of a patch classifier, stopped by validation, written as a model folder.

::

    OUT/
      config.json, weights.safetensors    the model: `wsi score --model OUT`
      CARD.md, figures.json               what it was trained on, and how good it is on patients kept back
      predictions.csv                     a row a patch of validation and test: label, probabilities
      split.csv                           a row a patch: path, patient, label, split
      log.csv, log.png                    loss and figures of each epoch
      run.json                            the configuration and the patches that this folder is bound to
      state.safetensors                   the training: the same command goes on from it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from wsi import __version__
from wsi.errors import ModelError, OutputError, TrainError
from wsi.files import replacing, write_csv, write_json
from wsi.nn.begin import classifier_of, fresh_model, model_from
from wsi.nn.mil import Head
from wsi.nn.patch import PatchModel, pick_precision
from wsi.stain.augment import StainAugment
from wsi.store.codec import decode_jpeg, encode_jpeg
from wsi.train.cohort import Cohort, Split, check_split
from wsi.train.figures import best_threshold
from wsi.train.images import Patches
from wsi.train.loop import Loop, bind, digits, drawn, write_log
from wsi.train.mil import measure

U8 = npt.NDArray[np.uint8]
#: Training patches that mean and deviation of the input are taken from.
_MEASURED = 2048
_JPEG_QUALITY = (60, 96)


@dataclass(frozen=True)
class PatchConfig:
    """What decides the weights; the same values on the same patches give the same bytes on one CPU.

    Attributes
    ----------
    architecture : str
        "wsi-p4m", or a name of timm's: trained from random weights.
    arguments : dict
        Of its constructor.
    start : str, optional
        In place of an architecture, the model or encoder whose weights to begin from, see ``model_from``.
    frozen : bool
        Learn the classifier alone, on features that are computed once (linear probe): nothing is augmented.
    epochs : int
        At most.
    patience : int, optional
        Epochs without a lower validation loss after which to stop; the weights of the lowest are kept.
    lr : float, optional
        Of AdamW; default 1e-3, and 1e-4 where weights are begun from and not frozen.
    weight_decay : float
    batch : int
        Patches a step.
    balance : bool
        Draw patches so that all classes are equally frequent; probabilities then belong to such a population.
    stain : float
        Strength of the stain augmentation, see ``StainAugment``; 0 for none.
    turn : bool
        Turn by quarters and mirror, at random.
    jpeg : float
        Share of the patches that pass a JPEG codec of random quality.
    precision : {"auto", "float32", "bfloat16"}
    seed : int
    """

    architecture: str = "wsi-p4m"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    frozen: bool = False
    epochs: int = 30
    patience: int | None = 5
    lr: float | None = None
    weight_decay: float = 0.01
    batch: int = 32
    balance: bool = False
    stain: float = 0.1
    turn: bool = True
    jpeg: float = 0.0
    precision: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """Refuse what nothing could be trained with."""
        if self.frozen and self.start is None:
            raise ModelError("frozen", "random features tell nothing", "Begin from a model: --start NAME")
        if self.start is not None and self.arguments:
            raise ModelError("arguments", "a model that is begun from has its own", "Leave out --set, or --start")
        if min(self.epochs, self.batch, self.patience or 1) < 1 or (self.lr is not None and self.lr <= 0):
            raise TrainError("configuration", "epochs, batch, patience and lr must be above 0")
        if not (0 <= self.stain <= 1 and 0 <= self.jpeg <= 1):
            raise TrainError("configuration", "stain and jpeg are from 0 to 1")


def train_patches(
    cohort: Cohort,
    patches: Patches,
    split: Split,
    out: Path,
    config: PatchConfig,
    *,
    mpp: float,
    positive: Sequence[str] = (),
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda epoch, of: None,
) -> dict[str, Any]:
    """Train a patch classifier and write its model folder; the same call again goes on where it was stopped.

    Parameters
    ----------
    cohort, patches
        Labels and pixels by the same ids.
    split : Split
        Test patches are looked at once, at the end.
    out : Path
    config : PatchConfig
    mpp : float
        Microns per pixel of the patches: those that slides are then cut at.
    positive : sequence of str
        Classes that the heatmap shows from a threshold on, which is chosen on validation. Default: of two classes the
        second, of more none.
    device : str
    progress : callable
        Called with the epochs done, and how many at most.

    Returns
    -------
    dict
        The content of figures.json.

    Raises
    ------
    TrainError, ModelError
        Before anything is written.
    ConfigMismatch
        `out` holds a training of another configuration or of other patches.
    """
    config.check()
    if set(positive) - set(cohort.class_names):
        raise ModelError(f"positive={list(positive)}", "no such class", f"Classes: {', '.join(cohort.class_names)}")
    check_split(cohort, split, "split")
    positive = tuple(positive) or (cohort.class_names[1:] if len(cohort.class_names) == 2 else ())
    model = _model(cohort, patches, split, config, mpp, device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError.of(error, out) from error
    _bind(out, cohort, patches, split, config, mpp, positive)
    run = _Run(cohort, patches, split, config, model)
    run.go(out / "state.safetensors", progress)
    said = {part: run.said(ids) for part, ids in (("validation", split.validation), ("test", split.test)) if ids}
    threshold, chosen = 0.5, np.isin(cohort.class_names, positive)
    if chosen.any() and not chosen.all():
        truth = chosen[[cohort.cases[i].label for i in split.validation]]
        threshold = best_threshold(truth, said["validation"][:, chosen].sum(1)) if 0 < truth.mean() < 1 else 0.5
    weights = save({name: value.cpu().contiguous() for name, value in model.net.state_dict().items()})
    sha256 = hashlib.sha256(weights).hexdigest()
    figures: dict[str, Any] = {
        part: _figures(cohort, getattr(split, part), said.get(part)) for part in ("validation", "test")
    }
    figures |= {"best_epoch": run.best_epoch, "weights_sha256": sha256}
    with replacing(out / "weights.safetensors") as file:
        file.write(weights)
    write_log(out, [({}, run.history, run.best_epoch)])
    _write_tables(out, cohort, split, said)
    write_json(out / "figures.json", figures)
    written = _config_json(model, threshold, positive, sha256)
    with replacing(out / "CARD.md") as file:
        file.write(_card(out.resolve().name, cohort, split, config, written, figures).encode())
    write_json(out / "config.json", written)  # last: a folder with it is a model
    return figures


class _Run(Loop[Any]):
    """A training under way."""

    def __init__(self, cohort: Cohort, patches: Patches, split: Split, config: PatchConfig, model: PatchModel) -> None:
        self.cohort, self.patches, self.split, self.config, self.model = cohort, patches, split, config, model
        self.features: dict[str, torch.Tensor] | None = None
        if config.frozen:
            learnt = classifier_of(model.net, model.num_features)
            for name, weight in model.net.named_parameters():
                weight.requires_grad_(name in learnt)
            self.features = self._features([*split.train, *split.validation, *split.test])
        lr = 1e-4 if config.start is not None and not config.frozen else 1e-3
        super().__init__(model.net, config, config.lr or lr)

    def learn(self, rng: np.random.Generator) -> float:
        labels = [self.cohort.cases[i].label for i in self.split.train]
        ids = drawn(self.split.train, labels, self.config.balance, rng)
        total = 0.0
        for some, rgb in self._batches(ids, seed=int(rng.integers(2**31))):
            loss = torch.nn.functional.cross_entropy(self._logits(some, rgb), self._labels(some))
            total += self.step(loss) * len(some)
        return total / len(ids)

    def judge(self) -> dict[str, Any]:
        logits, labels = self._all_logits(self.split.validation), self._labels(self.split.validation)
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        cases = [self.cohort.cases[i] for i in self.split.validation]
        head = Head("softmax", len(self.cohort.class_names))
        return {"validation_loss": digits(loss)} | measure(cases, logits.double().softmax(1).cpu().numpy(), head)

    @torch.inference_mode()
    def said(self, ids: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return probabilities (n, k)."""
        return np.asarray(self._all_logits(ids).double().softmax(1).cpu().numpy())

    def _logits(self, ids: Sequence[str], rgb: U8 | None) -> torch.Tensor:
        if self.features is not None:
            return self.net.classify(torch.stack([self.features[i] for i in ids])).float()  # type: ignore[no-any-return]
        assert rgb is not None
        return self.model.forward(self.model.normalised(rgb))[1].float()

    def _all_logits(self, ids: Sequence[str]) -> torch.Tensor:
        return torch.cat([self._logits(some, rgb) for some, rgb in self._batches(ids, seed=None)])

    def _labels(self, ids: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.cohort.cases[i].label for i in ids], device=self.model.device)

    @torch.inference_mode()
    def _features(self, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for some, rgb in self._batches(ids, seed=None):
            found |= zip(some, self.model.forward(self.model.normalised(rgb))[0].float().clone(), strict=True)
        return found

    def _batches(self, ids: Sequence[str], *, seed: int | None) -> Iterator[tuple[Sequence[str], Any]]:
        """Give batches of nearly equal size and their pixels, augmented by `seed`; the next is made meanwhile."""
        count = -(
            -len(ids) // self.config.batch
        )  # equal sizes: batch normalisation cannot learn from a last single one
        parts = [ids[len(ids) * k // count : len(ids) * (k + 1) // count] for k in range(count)]
        if self.features is not None:
            yield from ((part, None) for part in parts)
            return

        def load(k: int) -> U8:
            rgb = self.patches.read(parts[k])
            return rgb if seed is None else augmented(rgb, self.config, [seed, k])

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(load, 0)
            for k, part in enumerate(parts):
                rgb = ahead.result()
                if k + 1 < count:
                    ahead = pool.submit(load, k + 1)
                yield part, rgb


def augmented(rgb: U8, config: PatchConfig, seed: Sequence[int]) -> U8:
    """Turn, restain and recompress patches, uint8 (n, h, w, 3), each by its own draw from `seed`.

    Examples
    --------
    >>> rgb = np.zeros((2, 8, 8, 3), np.uint8)
    >>> augmented(rgb, PatchConfig(jpeg=0.5), [0, 1]).shape
    (2, 8, 8, 3)
    """
    rng = np.random.default_rng(seed)
    if config.turn:
        turns = [
            np.rot90(tile[:, ::-1] if mirror else tile, turn)
            for tile, turn, mirror in zip(rgb, rng.integers(4, size=len(rgb)), rng.random(len(rgb)) < 0.5, strict=True)
        ]
        rgb = np.stack(turns)
    if config.stain:
        rgb = StainAugment(config.stain)(np.ascontiguousarray(rgb), seed=int(rng.integers(2**31)))
    if config.jpeg:
        rgb = np.ascontiguousarray(rgb)
        for i in np.flatnonzero(rng.random(len(rgb)) < config.jpeg).tolist():
            sampling = ("4:4:4", "4:2:2", "4:2:0")[int(rng.integers(3))]
            decode_jpeg(encode_jpeg(rgb[i], int(rng.integers(*_JPEG_QUALITY)), sampling), rgb[i])
    return rgb


def _model(cohort: Cohort, patches: Patches, split: Split, config: PatchConfig, mpp: float, device: str) -> PatchModel:
    torch.manual_seed(config.seed)
    precision = pick_precision(config.precision, device)
    if config.start is not None:
        return model_from(
            config.start, cohort.class_names, tile_px=patches.tile_px, mpp=mpp, device=device, precision=precision
        )
    some = np.random.default_rng(config.seed).permutation(len(split.train))[:_MEASURED]
    pixels = patches.read([split.train[i] for i in some]).reshape(-1, 3)
    counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])  # exact, in no order
    value = np.arange(256) / 255
    mean = counts @ value / len(pixels)
    std = np.sqrt(np.maximum(counts @ value**2 / len(pixels) - mean**2, 0)).clip(0.01)
    return fresh_model(
        config.architecture, config.arguments, cohort.class_names, tile_px=patches.tile_px, mpp=mpp,
        mean=mean.round(4).tolist(), std=std.round(4).tolist(), device=device, precision=precision,
    )  # fmt: skip


def _bind(
    out: Path, cohort: Cohort, patches: Patches, split: Split, config: PatchConfig, mpp: float, positive: Sequence[str]
) -> None:
    """Bind a folder to configuration, patches, labels and split."""
    digest = hashlib.sha256()
    for part in split:
        for i in part:
            case = cohort.cases[i]
            digest.update(
                f"{i}\0{case.patient}\0{case.label}\0{patches.checksums[i]}\n".encode(errors="backslashreplace")
            )
        digest.update(b"\n")
    identity = {
        "wsi_version": __version__,
        "config": asdict(config) | {"arguments": dict(config.arguments)},
        "mpp": mpp,
        "positive": list(positive),
        "class_names": list(cohort.class_names),
        "patches, labels or split": digest.hexdigest(),
    }
    bind(out, identity)


def _figures(cohort: Cohort, ids: Sequence[str], said: npt.NDArray[np.float64] | None) -> dict[str, Any] | None:
    if said is None:
        return None
    cases = [cohort.cases[i] for i in ids]
    count = {"patches": len(cases), "patients": len({case.patient for case in cases})}
    return count | measure(cases, said, Head("softmax", len(cohort.class_names)))


def _write_tables(out: Path, cohort: Cohort, split: Split, said: Mapping[str, npt.NDArray[np.float64]]) -> None:
    names, predictions, division = cohort.class_names, [], []
    for part, ids in split._asdict().items():
        for n, i in enumerate(ids):
            case = cohort.cases[i]
            row = {"path": i, "patient": case.patient, "label": names[case.label], "split": part}
            division.append(row)
            if part in said:
                chances = {f"prob_{name}": f"{p:.6g}" for name, p in zip(names, said[part][n], strict=True)}
                predictions.append(row | chances)
    write_csv(out / "split.csv", list(division[0]), division)
    write_csv(out / "predictions.csv", list(predictions[0]), predictions)


def _config_json(model: PatchModel, threshold: float, positive: Sequence[str], sha256: str) -> dict[str, Any]:
    config = model.config
    resize = [] if config.resize_px is None else [{"name": "Resize", "arguments": {"size": config.resize_px}}]
    normalise = {"name": "Normalize", "arguments": {"mean": list(config.mean), "std": list(config.std)}}
    return {
        "spec_version": "1.0",
        "task": "patch",
        "architecture": config.architecture,
        "architecture_args": config.architecture_args,
        "num_classes": len(config.class_names),
        "class_names": list(config.class_names),
        "patch_size_pixels": config.tile_px,
        "spacing_um_px": config.mpp,
        "transform": [*resize, {"name": "ToTensor"}, normalise],
        "positive_classes": list(positive),
        "threshold": threshold,
        "weights_sha256": sha256,
    }


def _card(
    name: str,
    cohort: Cohort,
    split: Split,
    config: PatchConfig,
    written: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> str:
    counts = np.bincount([case.label for case in cohort.cases.values()], minlength=len(cohort.class_names))
    patients = {case.patient for case in cohort.cases.values()}
    origin = f"begun from `{config.start}`" if config.start else "random weights"
    how = "features once, the classifier alone" if config.frozen else (
        f"stain augmentation {config.stain:g}, {'turned and mirrored' if config.turn else 'not turned'}, "
        f"JPEG {config.jpeg:g}"
    )  # fmt: skip
    lines = [
        f"# {name}",
        "",
        "**Research use only. Not a medical device; not validated for diagnosis.**",
        "",
        "| | |",
        "|---|---|",
        f"| Task | a patch of {written['patch_size_pixels']} px at {written['spacing_um_px']:g} microns per pixel -> "
        f"{', '.join(f'`{c}`' for c in cohort.class_names)} |",
        f"| Model | `{written['architecture']}` `{json.dumps(written['architecture_args'])}`, {origin} |",
        f"| Training | {how}; the classes {'drawn equally often' if config.balance else 'as frequent as they are'}; "
        f"{len(split.train)} patches |",
        f"| Data | {len(cohort.cases)} patches of {len(patients)} patients: "
        + ", ".join(f"{c} {n}" for c, n in zip(cohort.class_names, counts, strict=True))
        + " |",
        f"| Chosen on validation | epoch {figures['best_epoch']}, threshold {written['threshold']:g} |",
        f"| sha256 | `{written['weights_sha256']}` |",
        "",
        "## Figures",
        "",
        "Validation patches stopped the training; test patches decided nothing. No patient is in two parts.",
        "",
    ]
    for part in ("validation", "test"):
        found = figures[part]
        if found is not None:
            numbers = {key: v for key, v in found.items() if key not in ("patches", "patients")}
            shown = ", ".join(f"{k} {'undefined' if v is None else f'{v:.3f}'}" for k, v in numbers.items())
            lines.append(f"- {part}: {shown} ({found['patches']} patches, {found['patients']} patients)")
    lines += ["", "## Limits", "", "Write here what these patches do not represent: laboratories, scanners, patients."]
    return "\n".join(lines) + "\n"
