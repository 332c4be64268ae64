"""The stain range of a trained model, and how many held-out patients lie outside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wsi.errors import WsiError
from wsi.slide.base import U8
from wsi.stain.range import Point, StainRange, measure, point_of
from wsi.stain.statistics import Unmeasurable
from wsi.train.cohort import Split


def learn_stains(
    pixels: Mapping[str, Callable[[], U8]], patients: Mapping[str, str], splits: Sequence[Split]
) -> tuple[StainRange, dict[str, Any]]:
    """Measure slides' stains, and find the range of those in any split's training part.

    Parameters
    ----------
    pixels : mapping of slide to callable
        Returns tiles of the slide, uint8 (m, h, w, 3).
    patients : mapping of slide to str
        Of the same slides.

    Returns
    -------
    StainRange
        Without a limit, but with the reason, where a slide's pixels are not available or patients are too few. Slides
        whose two stains cannot be separated are skipped.
    dict
        For validation and test: how many slides were measured, and how many of them lie outside the range of their own
        split's training slides; {} where no split has a limit.
    """
    points: dict[str, Point] = {}
    for slide, read in pixels.items():
        try:
            points[slide] = point_of(measure(read()))
        except Unmeasurable:
            continue
        except (WsiError, OSError) as error:
            # Without its path: the reason is published with the model.
            what = error.what if isinstance(error, WsiError) else error.strerror
            what = what or f"cannot be read ({type(error).__name__})"
            return StainRange(reason=f"stains were not measured: {slide} {what}"), {}

    def range_of(slides: Sequence[str]) -> StainRange:
        known = [slide for slide in slides if slide in points]
        return StainRange.of([points[slide] for slide in known], [patients[slide] for slide in known])

    figures: dict[str, Any] = {}
    for part in ("validation", "test"):
        seen = [
            own.check(points[slide]).outside is not None
            for split in splits
            if (own := range_of(split.train)).limit is not None
            for slide in getattr(split, part)
            if slide in points
        ]
        if seen:
            figures[part] = {"slides": len(seen), "outside": sum(seen)}
    return range_of(sorted({slide for split in splits for slide in split.train})), figures


def stains_line(known: StainRange, figures: Mapping[str, Any]) -> str:
    """Describe the range in a row of a model card."""
    if known.limit is None:
        return f"| Stains | not known, so none is called unlike: {known.reason} |"
    shown = "; ".join(f"{part} {found['outside']} of {found['slides']} outside" for part, found in figures.items())
    return (
        f"| Stains | {known.coverage:.0%} of {known.patients} training patients lie within {known.limit:.3g} (degrees; "
        f"`stain.json`) of another{'; ' if shown else ''}{shown} |"
    )
