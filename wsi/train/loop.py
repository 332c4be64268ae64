"""The training loop: epochs, early stopping on validation, and a saved state to resume from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from wsi.errors import TrainError
from wsi.files import replacing, write_csv

if TYPE_CHECKING:
    from wsi.train.classifier import PatchConfig
    from wsi.train.mil import MilConfig


class Loop:
    """A training loop; subclasses define ``learn`` and ``judge``.

    All random numbers of an epoch come from (seed, epoch), so a resumed training gives the same bytes.

    Parameters
    ----------
    net : Module
        On its device. Weights without a gradient are neither trained nor saved in the state.
    lr : float
        Initial learning rate of AdamW; falls to 0 over the epochs by a cosine.

    Attributes
    ----------
    history : list of dict
        One row an epoch.
    """

    def __init__(self, net: Any, config: MilConfig | PatchConfig, lr: float) -> None:
        self.net = net
        self._config, self._lr = config, lr
        self._weights = [weight for weight in net.parameters() if weight.requires_grad]
        self._frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
        self._optimiser = torch.optim.AdamW(self._weights, lr=lr, weight_decay=config.weight_decay, fused=True)
        self._best: dict[str, torch.Tensor] = {}
        self.history: list[dict[str, Any]] = []

    def learn(self, rng: np.random.Generator) -> float:
        """Train one epoch; return the mean loss."""
        raise NotImplementedError

    def judge(self) -> dict[str, Any]:
        """Return ``validation_loss`` and figures of the validation part; {} without one."""
        raise NotImplementedError

    def go(self, state: Path | None, progress: Callable[[int, int], None]) -> None:
        """Train to the end, or resume from the file `state`; then ``net`` holds the best weights."""
        if state is not None and state.is_file():
            self._restore(state)
        while not self.finished:
            self._epoch()
            progress(len(self.history), self._config.epochs)
            if state is not None:
                self._save(state)
        self.net.load_state_dict(self.net.state_dict() | self._best)
        self.net.eval()

    def step(self, loss: torch.Tensor) -> float:
        """Take an optimiser step on the loss of a batch; return the loss."""
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._weights, 5.0)
        self._optimiser.step()
        return loss.item()

    @property
    def best_epoch(self) -> int:
        """Epoch whose weights are kept, from 1: that of the lowest validation loss; without ``patience`` the last."""
        if self._config.patience is None:
            return len(self.history)
        return 1 + int(np.argmin([row["validation_loss"] for row in self.history]))

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or ``patience`` is used up."""
        done, patience = len(self.history), self._config.patience
        return done >= self._config.epochs or (patience is not None and done > 0 and done - self.best_epoch >= patience)

    def _epoch(self) -> None:
        number = len(self.history)
        seed = int(np.random.default_rng((self._config.seed, number)).integers(2**62))
        torch.manual_seed(seed)
        for group in self._optimiser.param_groups:
            group["lr"] = self._lr * 0.5 * (1 + np.cos(np.pi * number / self._config.epochs))
        self.net.train()
        loss = self.learn(np.random.default_rng(seed))
        if not np.isfinite(loss):
            raise TrainError(f"epoch {number + 1}", "the loss is not finite", "Lower --lr, or look at the features")
        self.net.eval()
        with torch.inference_mode():
            self.history.append({"epoch": number + 1, "train_loss": digits(loss)} | self.judge())
        if self.best_epoch == len(self.history):
            self._best = {name: value.detach().clone() for name, value in self._learnt().items()}

    def _learnt(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.net.state_dict().items() if name not in self._frozen}

    def _save(self, path: Path) -> None:
        tensors = {f"net.{name}": value for name, value in self._learnt().items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        for i, slots in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": value for name, value in slots.items()}
        packed = save(
            {name: value.cpu().contiguous() for name, value in tensors.items()}, {"history": json.dumps(self.history)}
        )
        with replacing(path) as file:
            file.write(packed)

    def _restore(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
                self.history = json.loads(file.metadata()["history"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise TrainError(path, f"is damaged ({error})", "Delete it: the training begins again") from error
        kept = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
        self.net.load_state_dict(self.net.state_dict() | kept)
        self._best = {k.removeprefix("best."): v for k, v in tensors.items() if k.startswith("best.")}
        optimiser = self._optimiser.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".")
                weight = self._weights[int(number)]
                if value.shape == weight.shape:  # the fused step needs the weight's memory layout
                    value = torch.empty_like(weight, requires_grad=False).copy_(value)
                optimiser["state"].setdefault(int(number), {})[name] = value
        self._optimiser.load_state_dict(optimiser)


def finite(logits: torch.Tensor, ids: Sequence[str]) -> torch.Tensor:
    """Return logits (n, k); raise TrainError for the first case with one that is not finite."""
    bad = ~logits.isfinite().all(1)
    if bool(bad.any()):
        first = ids[int(bad.nonzero()[0, 0])]
        raise TrainError(first, "what the network says of it is not finite", "Lower --lr, or look at its features")
    return logits


def drawn(ids: Sequence[str], labels: Sequence[int], balance: bool, rng: np.random.Generator) -> list[str]:
    """Shuffle an epoch's cases; with `balance`, sample as many with all classes equally likely."""
    if not balance:
        return [ids[i] for i in rng.permutation(len(ids))]
    label = np.array(labels)
    weight = 1 / np.bincount(label)[label]
    return [ids[i] for i in rng.choice(len(ids), len(ids), p=weight / weight.sum())]


def write_log(out: Path, trained: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]], int]]) -> None:
    """Write log.csv and log.png of trainings, each given as its identifying columns, its history and its best epoch."""
    from matplotlib.figure import Figure

    log = [{**name, **row} for name, history, _ in trained for row in history]
    write_csv(out / "log.csv", list(log[0]), log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (_, history, best_epoch) in enumerate(trained):
        epochs = [row["epoch"] for row in history]
        for key, style in (("train_loss", ":"), ("validation_loss", "-")):
            label = key.replace("_", " ") if i == 0 else None
            axes.plot(epochs, [row[key] for row in history], style, color=f"C{i % 10}", label=label)
        axes.axvline(best_epoch, color=f"C{i % 10}", linewidth=0.5)
    axes.set_xlabel("epoch (thin line: the one that is kept)")
    axes.set_ylabel("loss")
    axes.legend()
    with replacing(out / "log.png") as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})  # no version: same bytes


def as_dict(config: MilConfig | PatchConfig) -> dict[str, Any]:
    """Return a configuration as run.json holds it."""
    return asdict(config) | {"arguments": dict(config.arguments)}


def digits(value: float | None) -> float | None:
    """Round to eight significant digits: enough to distinguish epochs, and unchanged by saving and resuming."""
    return None if value is None else float(f"{value:.8g}")
