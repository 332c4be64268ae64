"""Training of a patch classifier: from patches, a split and a configuration to the network of the best epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wsi.errors import ModelError, TrainError
from wsi.nn.begin import classifier_of, fresh_model, model_from
from wsi.nn.mil import Head
from wsi.nn.patch import PatchModel, pick_precision
from wsi.stain.augment import StainAugment
from wsi.store.codec import decode_jpeg, encode_jpeg
from wsi.train.cohort import Cohort, Split
from wsi.train.images import Patches
from wsi.train.loop import Loop, digits, drawn, finite
from wsi.train.mil import measure

U8 = npt.NDArray[np.uint8]
#: Number of training patches on which the input's mean and standard deviation are measured.
_MEASURED = 2048
_JPEG_QUALITY = (60, 96)


@dataclass(frozen=True)
class PatchConfig:
    """What determines the weights: on one CPU, the same values and patches give the same bytes.

    Attributes
    ----------
    architecture : str
        "wsi-p4m" or a timm name, trained from random weights.
    arguments : dict
        Of the architecture's constructor.
    start : str, optional
        Model or encoder whose weights to start from, instead of `architecture`; see ``model_from``.
    frozen : bool
        Linear probe: train only the classifier, on features computed once. Nothing is augmented.
    epochs : int
        Maximum.
    patience : int, optional
        Stop after so many epochs without a lower validation loss, and keep the weights of the lowest.
    lr : float, optional
        Of AdamW; default 1e-3, or 1e-4 for fine-tuning (`start` without `frozen`).
    weight_decay : float
    batch : int
        Patches a step.
    balance : bool
        Sample all classes equally often; probabilities then refer to such a population.
    stain : float
        Strength of the stain augmentation, see ``StainAugment``; 0 for none.
    turn : bool
        Rotate by quarter turns and mirror, at random.
    jpeg : float
        Share of the patches that are recompressed by JPEG of random quality.
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
        """Refuse settings that cannot be trained with."""
        if self.frozen and self.start is None:
            raise ModelError("frozen", "random features tell nothing", "Begin from a model: --start NAME")
        if self.start is not None and self.arguments:
            raise ModelError("arguments", "a model that is begun from has its own", "Leave out --set, or --start")
        lr = 1.0 if self.lr is None else self.lr
        if min(self.epochs, self.batch, self.patience or 1) < 1 or not 0 < lr < float("inf"):
            raise TrainError("configuration", "epochs, batch, patience and lr must be above 0")
        if not 0 <= self.weight_decay < float("inf"):
            raise TrainError("configuration", f"weight decay is {self.weight_decay:g}", "Give 0 or more")
        if not (0 <= self.stain <= 1 and 0 <= self.jpeg <= 1):
            raise TrainError("configuration", "stain and jpeg are from 0 to 1")


def begin(cohort: Cohort, patches: Patches, split: Split, config: PatchConfig, mpp: float, device: str) -> PatchModel:
    """Make the model to train; the normalisation of a fresh one is measured on training patches."""
    torch.manual_seed(config.seed)
    precision = pick_precision(config.precision, device)
    if config.start is not None:
        return model_from(
            config.start, cohort.class_names, tile_px=patches.tile_px, mpp=mpp, device=device, precision=precision
        )
    some = np.random.default_rng(config.seed).permutation(len(split.train))[:_MEASURED]
    pixels = patches.read([split.train[i] for i in some]).reshape(-1, 3)
    counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])  # exact in any order
    value = np.arange(256) / 255
    mean = counts @ value / len(pixels)
    std = np.sqrt(np.maximum(counts @ value**2 / len(pixels) - mean**2, 0)).clip(0.01)
    return fresh_model(
        config.architecture, config.arguments, cohort.class_names, tile_px=patches.tile_px, mpp=mpp,
        mean=mean.round(4).tolist(), std=std.round(4).tolist(), device=device, precision=precision,
    )  # fmt: skip


class PatchTraining(Loop):
    """The training of a patch model; see ``Loop``. `cohort` and `patches` share their ids."""

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
            try:
                logits = self._logits(some, rgb)
            except ValueError as error:  # torch's, of batch normalisation
                if len(some) > 1:
                    raise
                what = f"teaches this network nothing ({error})"
                raise TrainError("a batch of one patch", what, "Use --batch 4 or more") from error
            loss = torch.nn.functional.cross_entropy(logits, self._labels(some))
            total += self.step(loss) * len(some)
        return total / len(ids)

    def judge(self) -> dict[str, Any]:
        logits, labels = self._all_logits(self.split.validation), self._labels(self.split.validation)
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        cases = [self.cohort.cases[i] for i in self.split.validation]
        head = Head("softmax", len(self.cohort.class_names))
        return {"validation_loss": digits(loss)} | measure(cases, logits.double().softmax(1).cpu().numpy(), head)

    @torch.inference_mode()
    def probabilities(self, ids: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return probabilities (n, k)."""
        return np.asarray(self._all_logits(ids).double().softmax(1).cpu().numpy())

    def _logits(self, ids: Sequence[str], rgb: U8 | None) -> torch.Tensor:
        if self.features is not None:
            return self.net.classify(torch.stack([self.features[i] for i in ids])).float()  # type: ignore[no-any-return]
        assert rgb is not None
        return self.model.forward(self.model.normalised(rgb))[1].float()

    def _all_logits(self, ids: Sequence[str]) -> torch.Tensor:
        return finite(torch.cat([self._logits(some, rgb) for some, rgb in self._batches(ids, seed=None)]), ids)

    def _labels(self, ids: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.cohort.cases[i].label for i in ids], device=self.model.device)

    @torch.inference_mode()
    def _features(self, ids: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for some, rgb in self._batches(ids, seed=None):
            found |= zip(some, self.model.forward(self.model.normalised(rgb))[0].float().clone(), strict=True)
        return found

    def _batches(self, ids: Sequence[str], *, seed: int | None) -> Iterator[tuple[Sequence[str], Any]]:
        """Yield batches of ids and their pixels, augmented where `seed` is given; the next batch loads meanwhile."""
        count = -(-len(ids) // self.config.batch)
        # Batches of nearly equal size: batch normalisation fails on a last batch of one patch.
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
    """Rotate, restain and recompress patches, uint8 (n, h, w, 3), each by its own draw from `seed`.

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
