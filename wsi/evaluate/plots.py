"""The plots of a report; lines differ by their dashes, so that they can be told apart in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.evaluate.report import Plot
from wsi.metrics.calibration import ReliabilityBin, net_benefit
from wsi.metrics.estimate import Estimate
from wsi.metrics.froc import PER_SLIDE, Froc
from wsi.metrics.roc import roc_curve

_DASHES = ("-", "--", ":", "-.")
_SHADES = ("#000000", "#1f5f9e", "#b04a00", "#6b6b6b")


def roc_plot(curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> Plot:
    """Draw ROC curves of (labels, scores); the names should contain the area."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for i, (name, (labels, scores)) in enumerate(curves.items()):
            curve = roc_curve(labels, scores)
            axes.step(
                curve.false_positive_rate, curve.true_positive_rate, where="post", label=name, **_line(i), linewidth=1.8
            )
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        _legend(axes)
        _clean(axes)

    return Plot("roc", "ROC curve", draw)


def froc_plot(curves: Mapping[str, Froc]) -> Plot:
    """Draw FROC curves, with circles at the six operating points."""

    def draw(axes: Any) -> None:
        for i, (name, curve) in enumerate(curves.items()):
            # Beyond its last point the curve is constant, as in the score.
            x, y = np.append(20.0, curve.per_slide), np.append(curve.sensitivity[0], curve.sensitivity)
            axes.plot(x, y, label=f"{name} {curve.score}", **_line(i), linewidth=1.8)
            axes.plot(PER_SLIDE, curve.at, "o", color=_SHADES[i % 4], markerfacecolor="white")
        axes.set_xscale("symlog", base=2, linthresh=0.125)
        axes.set_xticks([0, *PER_SLIDE], ["0", "1/4", "1/2", "1", "2", "4", "8"])
        axes.set(xlabel="false positives a slide", ylabel="lesion sensitivity", xlim=(-0.02, 8.5), ylim=(-0.01, 1.02))
        _legend(axes)
        _clean(axes)

    return Plot("froc", "FROC curve, with the six operating points", draw)


def confusion_plot(counts: npt.NDArray[np.int64], names: Sequence[str], name: str = "confusion") -> Plot:
    """Draw a confusion matrix; rows are the reference."""

    def draw(axes: Any) -> None:
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(share, cmap="Greys", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            dark = share[row, column] > 0.5
            axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="reference")

    return Plot(name, f"{name.replace('_', ' ').capitalize()}: cases; grey is the share of the row", draw)


def reliability_plot(table: Sequence[ReliabilityBin]) -> Plot:
    """Draw observed frequency over predicted probability; a circle's size is the number of cases."""

    def draw(axes: Any) -> None:
        filled = [each for each in table if each.n]
        most = max(each.n for each in filled)
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        axes.plot([b.probability for b in filled], [b.frequency for b in filled], color="black", linewidth=1)
        sizes = [20 + 180 * b.n / most for b in filled]
        axes.scatter([b.probability for b in filled], [b.frequency for b in filled], sizes, "0.5", edgecolors="black")
        axes.set(xlabel="mean probability", ylabel="share of positives", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        _clean(axes)

    return Plot("reliability", "Reliability: circles are bins, their size the number of cases", draw)


def net_benefit_plot(labels: npt.NDArray[np.bool_], probabilities: npt.NDArray[np.float64]) -> Plot:
    """Draw the decision curves of the model, of treating everyone, and of treating nobody."""

    def draw(axes: Any) -> None:
        t = np.linspace(0.01, 0.99, 99)
        prevalence = labels.mean()
        everyone = prevalence - (1 - prevalence) * t / (1 - t)
        for i, (name, values) in enumerate(
            {"model": net_benefit(labels, probabilities, t), "everyone": everyone, "nobody": 0 * t}.items()
        ):
            axes.plot(t, values, label=name, **_line(i), linewidth=1.8)
        axes.set(xlabel="threshold probability", ylabel="net benefit", ylim=(-0.05, max(prevalence, 0.05) * 1.1))
        _legend(axes)
        _clean(axes)

    return Plot("net_benefit", "Decision curve", draw)


def forest_plot(rows: Mapping[str, Estimate], metric: str, name: str = "subgroups") -> Plot:
    """Draw an estimate with its interval for each subgroup."""

    def draw(axes: Any) -> None:
        known = {name: e for name, e in rows.items() if e.value is not None}
        for i, estimate in enumerate(known.values()):
            if estimate.low is not None and estimate.high is not None:
                axes.plot([estimate.low, estimate.high], [-i, -i], color="black", linewidth=1.4)
            axes.plot(estimate.value, -i, "s", color="black", markerfacecolor="white" if i else "black")
        axes.set_yticks([-i for i in range(len(known))], [f"{_short(name)} (n={e.n})" for name, e in known.items()])
        ends = [end for e in known.values() for end in (e.value, e.low, e.high) if end is not None]
        if ends:  # no metric drawn here exceeds 1
            low = min(ends) - 0.05
            axes.set_xlim(low if min(ends) < 0 else max(low, -0.01), min(max(ends) + 0.05, 1.01))
        axes.set(xlabel=metric, ylim=(0.5 - len(known), 0.5))
        _clean(axes)

    return Plot(name, f"{metric} by subgroup, 95 % intervals", draw)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Masks of a slide, bool (rows, columns), of the annotated and of the found area, and their Dice coefficient."""

    slide_id: str
    dice: float
    truth: npt.NDArray[np.bool_]
    found: npt.NDArray[np.bool_]


_MOST_SLIDES = 30


def dice_plot(dices: Mapping[str, float], mean: Estimate) -> Plot:
    """Draw each slide's Dice coefficient, the lowest at the bottom; of many slides only the lowest."""
    lowest = sorted(dices.items(), key=lambda item: item[1])[:_MOST_SLIDES]
    what = "every slide" if len(lowest) == len(dices) else f"the {len(lowest)} lowest of {len(dices)} slides"

    def draw(axes: Any) -> None:
        if mean.low is not None and mean.high is not None:
            axes.axvspan(mean.low, mean.high, color="0.88", linewidth=0)
        axes.axvline(mean.value, color="0.4", linestyle="--", linewidth=1.4, label=f"mean of all {mean}")
        axes.plot([value for _, value in lowest], range(len(lowest)), "o", color="black", markersize=5)
        axes.set_yticks(range(len(lowest)), [_short(name) for name, _ in lowest], fontsize=7 if len(lowest) > 15 else 9)
        axes.set(xlabel="Dice", xlim=(-0.02, 1.02), ylim=(-0.7, len(lowest) - 0.3))
        _legend(axes)
        _clean(axes)

    return Plot("dice", f"Dice of {what}; the band is the mean's interval", draw)


def overlap_plot(slides: Sequence[Overlap]) -> Plot:
    """Draw where annotated and found areas agree, for up to six slides."""

    def draw(axes: Any) -> None:
        from matplotlib.patches import Patch

        axes.set_axis_off()
        columns = min(len(slides), 3)
        rows = -(-len(slides) // columns)
        shades = {"both": 0.6, "missed": 0.0, "found alone": 0.82}
        for i, slide in enumerate(slides):
            row, column = divmod(i, columns)
            panel = axes.inset_axes((column / columns, 1 - (row + 1) / rows, 0.94 / columns, 0.86 / rows))
            picture = np.ones(slide.truth.shape)
            picture[slide.truth & slide.found] = shades["both"]
            picture[slide.truth & ~slide.found] = shades["missed"]
            picture[~slide.truth & slide.found] = shades["found alone"]
            panel.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            panel.set_title(f"{_short(slide.slide_id)}: {slide.dice:.3f}", fontsize=9)
            panel.set_xticks([])
            panel.set_yticks([])
        patches = [Patch(facecolor=str(shade), edgecolor="black", label=name) for name, shade in shades.items()]
        axes.figure.legend(handles=patches, ncols=3, frameon=False, loc="outside lower center")

    return Plot("overlap", "Drawn and found areas, and Dice: the slides where they agree least", draw)


def _legend(axes: Any) -> None:
    """Draw the legend above the axes, where it hides no curve."""
    axes.figure.legend(frameon=False, loc="outside upper center")


def _short(name: str) -> str:
    """A name, shortened; dollars are escaped, since matplotlib would read a formula between two."""
    return (name if len(name) <= 24 else f"{name[:11]}..{name[-11:]}").replace("$", r"\$")


def _line(i: int) -> dict[str, str]:
    return {"linestyle": _DASHES[i % 4], "color": _SHADES[i % 4]}


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
