"""Fitting of a transform, from pixels or a slide and a target."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wsi.errors import StainError
from wsi.files import opened_image
from wsi.slide.base import U8, Slide
from wsi.stain import macenko, reinhard, ruifrok, vahadane
from wsi.stain.config import FitConfig
from wsi.stain.pixels import checked, sample_slide
from wsi.stain.statistics import LabStatistics, Stains, Unmeasurable
from wsi.stain.targets import TARGETS
from wsi.stain.transform import StainTransform
from wsi.tissue import TissueMask

#: Name of each method and what it measures.
_MEASURES: dict[str, Callable[[U8, FitConfig], Stains | LabStatistics]] = {
    "macenko": macenko.measure,
    "vahadane": vahadane.measure,
    "ruifrok": ruifrok.measure,
    "reinhard": reinhard.measure,
}
METHODS = tuple(_MEASURES)


def fit(
    method: str,
    source: U8 | Slide,
    target: str | os.PathLike[str] | U8 | Slide | StainTransform = "veta",
    *,
    config: FitConfig | None = None,
    tissue: TissueMask | None = None,
    fallback: StainTransform | None = None,
) -> StainTransform:
    """Measure a slide's colours and return the transform to a target's.

    Fit once a slide, on pixels from all of it. A tile with few nuclei, fitted alone, would get haematoxylin that it
    does not have.

    Parameters
    ----------
    method : {"macenko", "vahadane", "ruifrok", "reinhard"}
    source : Slide, or uint8 (..., 3)
        A slide is sampled evenly over its tissue; all pixels of an array are pooled.
    target : str, path, uint8 (..., 3), Slide or StainTransform
        A name in ``TARGETS``, an image file, a transform saved as ``.json``, pixels, a slide, or a transform, whose
        target is taken.
    config : FitConfig, optional
    tissue : TissueMask, optional
        Of a slide `source`, where it is already known.
    fallback : StainTransform, optional
        Returned, and marked, where `source` cannot be measured: the slide's transform, for example, when a tile is
        fitted. Default: the identity.

    Returns
    -------
    StainTransform
        ``fallback`` is the reason where it is not a fit of `source`.

    Raises
    ------
    StainError
        No such method or target, a target that cannot be measured, or pixels that are not 8-bit RGB.
    SlideError
        A slide cannot be read.

    Examples
    --------
    >>> white = np.full((64, 64, 3), 255, np.uint8)
    >>> transform = fit("macenko", white)
    >>> transform.fallback, transform.source
    ('blank', None)
    """
    if method not in _MEASURES:
        raise StainError(f"method={method}", "no such stain normalisation", f"Known: {', '.join(METHODS)}")
    config = config or FitConfig()
    if not isinstance(source, Slide):
        checked(source, "source")
    wanted = _wanted(method, target, config)
    try:
        found = _measured(method, source, config, tissue)
        sparsity = config.sparsity if method == "vahadane" and config.published else None
        return StainTransform(method, found, wanted, config.io, config.published, sparsity=sparsity)
    except Unmeasurable as error:
        return dataclasses.replace(fallback or StainTransform(method), fallback=error.reason)


def _measured(
    method: str, source: U8 | Slide, config: FitConfig, tissue: TissueMask | None = None
) -> Stains | LabStatistics:
    rgb = sample_slide(source, config, tissue) if isinstance(source, Slide) else source
    return _MEASURES[method](rgb, config)


def _wanted(
    method: str, target: str | os.PathLike[str] | U8 | Slide | StainTransform, config: FitConfig
) -> Stains | LabStatistics:
    """Return the target's statistics for a method."""
    if isinstance(target, str) and target in TARGETS:
        named = TARGETS[target]
        return _for_method(method, named.lab if method == "reinhard" else named.stains, target)
    if isinstance(target, str | os.PathLike):
        target = _read(Path(target))
    if isinstance(target, StainTransform):
        return _for_method(method, target.target, "target")
    if not isinstance(target, Slide):
        checked(target, "target")
    try:
        return _measured(method, target, config)
    except Unmeasurable as error:
        raise StainError("target", error.what, "Choose one with plenty of both stains") from error


def _for_method(method: str, statistics: Stains | LabStatistics | None, where: str) -> Stains | LabStatistics:
    if not isinstance(statistics, LabStatistics if method == "reinhard" else Stains):
        raise StainError(where, f"holds nothing that {method} can aim at", "Use an image or a slide as target")
    return ruifrok.in_fixed_stains(statistics) if method == "ruifrok" and isinstance(statistics, Stains) else statistics


def _read(path: Path) -> U8 | StainTransform:
    """Read an image file or a saved transform."""
    remedy = f"Give an image file, a saved transform (.json), or one of {', '.join(TARGETS)}"
    try:
        if path.suffix == ".json":
            return StainTransform.from_json(path.read_text())
        with opened_image(path) as image:
            mode, rgb = image.mode, np.asarray(image)
    except FileNotFoundError as error:
        raise StainError(path, "there is no such target", remedy) from error
    except StainError:
        raise
    except ValueError as error:
        remedy += "; open a slide with open_slide first"
        raise StainError(path, f"is not an image that can be read ({error})", remedy) from error
    if mode != "RGB":
        raise StainError(path, f"is not an 8-bit RGB image but of mode {mode}", "Convert it to RGB")
    return rgb
