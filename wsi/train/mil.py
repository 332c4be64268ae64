"""Training of one MIL network: from bags, a split and a configuration to the network of the best epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wsi.errors import ModelError, TrainError
from wsi.metrics.kappa import quadratic_kappa
from wsi.nn.mil import MIL_NETS, Head, MilNet, Targets, TrainingBag, make_net
from wsi.nn.mil.heads import KINDS, Kind, breslow
from wsi.nn.mil.net import BLOCK
from wsi.nn.patch import pick_device
from wsi.slide.base import U8
from wsi.stain.range import sample_store
from wsi.store import PatchStore
from wsi.train import figures
from wsi.train.bags import read_bag
from wsi.train.cohort import Case, Cohort, Split
from wsi.train.loop import Loop, digits, drawn, finite

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class MilConfig:
    """What determines the weights: on one CPU, the same values and bags give the same bytes.

    Attributes
    ----------
    architecture : str
        A name in ``wsi.nn.mil.MIL_NETS``.
    arguments : dict
        Of its constructor.
    head : {"softmax", "binary", "ordinal", "hazard", "cox"}
    epochs : int
        Maximum; exact without `patience`.
    patience : int, optional
        Stop after so many epochs without a lower validation loss, and keep the weights of the lowest. None: train all
        epochs and keep the last.
    lr, weight_decay : float
        Of AdamW; the rate falls to 0 over `epochs` by a cosine.
    batch : int
        Bags a step. Cox compares the patients of a batch: at least 2.
    balance : bool
        Sample all classes equally often; probabilities then refer to such a population.
    seed : int
    """

    architecture: str = "gated-attention"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    head: Kind = "softmax"
    epochs: int = 100
    patience: int | None = 15
    lr: float = 2e-4
    weight_decay: float = 1e-3
    batch: int = 1
    balance: bool = False
    seed: int = 0

    def check(self) -> None:
        """Refuse settings that cannot be trained with."""
        if self.architecture not in MIL_NETS:
            raise ModelError(f"architecture {self.architecture!r}", "is not known", f"Known: {', '.join(MIL_NETS)}")
        if self.head not in KINDS:
            raise ModelError(f"head {self.head!r}", "is not known", f"Known: {', '.join(KINDS)}")
        if self.architecture.startswith("clam") and self.head != "softmax":
            raise ModelError(self.architecture, "learns from single tiles of each class", "Use it with --head softmax")
        if self.architecture == "noisy-or" and self.head in ("ordinal", "hazard"):  # its first logit is always 0
            raise ModelError("noisy-or", "says which classes are there, and knows no order", "Use another architecture")
        if self.head == "cox" and self.batch < 2:
            raise TrainError(f"batch={self.batch}", "Cox compares the patients of a batch", "Use --batch 16 or more")
        if min(self.epochs, self.batch, self.patience or 1) < 1 or not 0 < self.lr < float("inf"):
            raise TrainError("configuration", "epochs, batch, patience and lr must be above 0")


class BagStats(NamedTuple):
    """Number of tiles of a bag, and float64 (d,) sums of its features and of their squares."""

    tiles: int
    sum: Array
    square: Array


def stats_of(features: Array) -> BagStats:
    """Sum a bag's features (n, d) in blocks: a large bag converted to float64 at once would fill the memory."""
    total, square = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for start in range(0, len(features), BLOCK):
        x = features[start : start + BLOCK].astype(np.float64)
        total += x.sum(0)
        square += (x * x).sum(0)
    return BagStats(len(features), total, square)


class Bags:
    """Bags by slide id, read when first asked for and kept in memory up to `keep_bytes`.

    `encoder` selects features as in ``read_bag``. Raises TrainError where a bag cannot be used, or differs from the
    first in width or encoder.

    Attributes
    ----------
    stats : dict of slide id to BagStats
    samples : dict of bool to str
        One slide with coordinates (True) and one without (False), as far as there are such.
    in_features : int
    encoder : str, optional
        Encoder of all features.
    """

    def __init__(self, paths: Mapping[str, Path], *, encoder: str | None = None, keep_bytes: int = 4 << 30) -> None:
        self._paths, self._which = dict(paths), encoder
        self._kept: dict[str, TrainingBag] = {}
        self._left = keep_bytes
        self.stats: dict[str, BagStats] = {}
        self.samples: dict[bool, str] = {}
        first, self.in_features, self.encoder = "", 0, None
        for slide_id, path in self._paths.items():
            bag = read_bag(path, encoder)
            d = bag.features.shape[1]
            if not first:
                first, self.in_features, self.encoder = slide_id, d, bag.encoder
            if (d, bag.encoder) != (self.in_features, self.encoder):
                what = f"features are {d} wide, of {bag.encoder or 'an unnamed encoder'}; those of {first} "
                what += f"{self.in_features}, of {self.encoder or 'an unnamed encoder'}"
                raise TrainError(path, what, "One encoder for all slides: compute those of the others again")
            self.stats[slide_id] = stats_of(bag.features)
            self.samples.setdefault(bag.boxes is not None, slide_id)
            self._keep(slide_id, bag.features, bag.boxes)

    def __getitem__(self, slide_id: str) -> TrainingBag:
        """Return a bag, its features in the dtype of the file."""
        if slide_id in self._kept:
            return self._kept[slide_id]
        bag = read_bag(self._paths[slide_id], self._which)
        return self._keep(slide_id, bag.features, bag.boxes)

    def tiles(self, slide_id: str) -> U8:
        """Return a sample of a slide's tiles as the encoder saw them: uint8 (m, tile_px, tile_px, 3).

        Raises TrainError where the bag is a file of features; StoreError or SlideError where the store keeps no pixels
        and the slide cannot be found.
        """
        path = self._paths[slide_id]
        if path.name != "store.zarr":
            raise TrainError(path, "is a file of features, without pixels")
        return sample_store(PatchStore.open(path))

    def _keep(self, slide_id: str, features: Array, boxes: Array | None) -> TrainingBag:
        bag = TrainingBag(torch.from_numpy(features), None if boxes is None else torch.from_numpy(boxes))
        if features.nbytes <= self._left:
            self._left -= features.nbytes
            self._kept[slide_id] = bag
        return bag


class Member(NamedTuple):
    """One trained network.

    Attributes
    ----------
    net : MilNet
    head : Head
        With Cox's baseline, fitted on the training part.
    logits : dict of slide id to float64 (num_logits,)
        Of the validation and test slides.
    history : list of dict
        One row an epoch.
    best_epoch : int
        Epoch of these weights, from 1.
    """

    net: MilNet
    head: Head
    logits: dict[str, Array]
    history: list[dict[str, Any]]
    best_epoch: int


def train_member(
    cohort: Cohort,
    bags: Any,
    split: Split,
    config: MilConfig,
    *,
    device: str = "cpu",
    state: Path | None = None,
    progress: Callable[[int, int], None] = lambda epoch, of: None,
) -> Member:
    """Train one network on one split, or resume it.

    Parameters
    ----------
    bags : Bags
        Or another mapping of slide id to TrainingBag with `stats` and `in_features`.
    split : Split
        Test slides are predicted once, at the end.
    state : Path, optional
        File in which to save the state after each epoch.
    progress : callable
        Called with the epochs done, and the maximum.
    """
    config.check()
    baseline = _placeholder_baseline(cohort) if config.head == "cox" else ()
    head = Head(config.head, len(cohort.class_names), baseline=baseline)
    run = _Run(cohort, bags, split, config, head, device)
    run.go(state, progress)
    net = run.net
    if config.head == "cox":
        head = replace(head, baseline=_baseline(net, cohort, bags, split, device))
    ids = (*split.validation, *split.test)
    with torch.inference_mode():
        logits = dict(zip(ids, _logits(net, bags, ids, device).double().cpu().numpy(), strict=True)) if ids else {}
    return Member(net.cpu(), head, logits, run.history, run.best_epoch)


def try_net(cohort: Cohort, bags: Bags, config: MilConfig) -> None:
    """Refuse a network that cannot be built, or that needs coordinates which the bags lack."""
    net = _make(config, Head(config.head, len(cohort.class_names)), bags).eval()
    with torch.inference_mode():
        for slide_id in bags.samples.values():
            try:
                net(*bags[slide_id])
            except ValueError as error:
                raise TrainError(slide_id, str(error), "Give bags with coordinates, or another architecture") from error


class _Run(Loop):
    """A training under way."""

    def __init__(self, cohort: Cohort, bags: Any, split: Split, config: MilConfig, head: Head, device: str) -> None:
        self.cohort, self.bags, self.split = cohort, bags, split
        self.config, self.head, self.device = config, head, device
        torch.manual_seed(config.seed)
        net = _make(config, head, bags)
        net.set_scale(*scale_of([bags.stats[i] for i in split.train]))
        super().__init__(net.to(device), config, config.lr)

    def learn(self, rng: np.random.Generator) -> float:
        config = self.config
        ids = drawn(self.split.train, [self.cohort.cases[i].stratum for i in self.split.train], config.balance, rng)
        total = 0.0
        for start in range(0, len(ids), config.batch):
            some = ids[start : start + config.batch]
            batch = [_on(self.bags[i], self.device) for i in some]
            total += self.step(self.net.loss(batch, self._targets(some), self.head.loss)) * len(some)
        return total / len(ids)

    def judge(self) -> dict[str, Any]:
        if not self.split.validation:
            return {}
        logits = _logits(self.net, self.bags, self.split.validation, self.device)
        loss = float(self.head.loss(logits, self._targets(self.split.validation)))
        cases = [self.cohort.cases[i] for i in self.split.validation]
        probabilities = self.head.probabilities(logits.double().cpu()).numpy()
        return {"validation_loss": digits(loss)} | measure(cases, probabilities, self.head)

    def _targets(self, ids: Sequence[str]) -> Targets:
        return targets_of([self.cohort.cases[i] for i in ids], self.device)


def targets_of(cases: Sequence[Case], device: str = "cpu") -> Targets:
    """Return the targets of cases."""
    label = torch.tensor([case.label for case in cases], device=device)
    if cases[0].event is None:
        return Targets(label)
    time = torch.tensor([case.time for case in cases], dtype=torch.float32, device=device)
    return Targets(label, time, torch.tensor([case.event for case in cases], device=device))


def prepare(device: str, threads: int) -> str:
    """Resolve the device "auto", and set torch's CPU threads; with one thread, weights do not depend on the cores."""
    torch.set_num_threads(threads)
    return pick_device(device)


def scale_of(stats: Sequence[BagStats]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (d,) over all tiles of some bags, from their sums."""
    n = sum(bag.tiles for bag in stats)
    mean = sum(bag.sum for bag in stats) / n
    variance = np.clip(sum(bag.square for bag in stats) / n - mean**2, 0, None)
    return torch.from_numpy(np.asarray(mean)).float(), torch.from_numpy(np.sqrt(variance)).float()


def measure(cases: Sequence[Case], probabilities: Array, head: Head) -> dict[str, float | None]:
    """Measure the performance of probabilities (n, k); what is undefined is None."""
    label = np.array([case.label for case in cases])
    if head.kind in ("hazard", "cox"):
        time, event = np.array([case.time for case in cases]), np.array([case.event for case in cases])
        return {"concordance": digits(figures.concordance(time, event, figures.risk_of(probabilities)))}
    if head.kind == "ordinal":
        called = (probabilities.cumsum(1) < 0.5 - 1e-12).sum(1)
        kappa = quadratic_kappa(label, called, head.num_classes).value
        return {"quadratic_kappa": digits(kappa), "accuracy": digits(float((called == label).mean()))}
    called = probabilities.argmax(1)
    return {
        "auroc": digits(figures.macro_auroc(label, probabilities)),
        "accuracy": digits(float((called == label).mean())),
        "balanced_accuracy": digits(figures.balanced_accuracy(label, called)),
    }


def _baseline(net: MilNet, cohort: Cohort, bags: Any, split: Split, device: str) -> tuple[float, ...]:
    with torch.inference_mode():
        risk = _logits(net, bags, split.train, device)[:, 0].double().cpu().numpy()
    cases = [cohort.cases[i] for i in split.train]
    time, event = np.array([case.time for case in cases], np.float64), np.array([case.event for case in cases], bool)
    return tuple(breslow(risk, time, event, list(cohort.time_bins)))


def _placeholder_baseline(cohort: Cohort) -> tuple[float, ...]:
    """Return a placeholder baseline for training, where only the order of risks matters."""
    n = len(cohort.class_names)
    return tuple(1 - i / n for i in range(1, n))


def _make(config: MilConfig, head: Head, bags: Any) -> MilNet:
    arguments = {**config.arguments, "in_features": bags.in_features, "num_classes": head.num_logits}
    try:
        return make_net(config.architecture, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(config.architecture, f"arguments do not fit: {error}", "See its docstring") from error


def _logits(net: MilNet, bags: Any, ids: Sequence[str], device: str) -> torch.Tensor:
    """Return the logits (n, k) of some bags."""
    return finite(torch.stack([net(*_on(bags[i], device)).logits for i in ids]), ids)


def _on(bag: TrainingBag, device: str) -> TrainingBag:
    return bag if device == "cpu" else TrainingBag(bag.features.to(device), bag.boxes)
