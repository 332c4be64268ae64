"""The two units everything is said in: level-0 pixels and microns per pixel."""

from __future__ import annotations

from typing import NamedTuple


class Mpp(NamedTuple):
    """Microns per level-0 pixel along x and y.

    Examples
    --------
    >>> Mpp(0.25, 0.25).area_um2(400)
    25.0
    """

    x: float
    y: float

    def area_um2(self, area_px: float) -> float:
        """Area in square microns of `area_px` level-0 pixels."""
        return area_px * self.x * self.y


class Box(NamedTuple):
    """A rectangle in level-0 pixels, origin at the slide's top left corner.

    Sides and position may be fractional: a tile of 224 px at 0.5 mpp on a slide of 0.2431 mpp is
    460.715... level-0 px wide, and stays exactly that. Pixel (0, 0) spans [0, 1) x [0, 1).

    Examples
    --------
    >>> Box(0, 0, 10, 10).intersect(Box(5, 5, 10, 10))
    Box(x=5, y=5, w=5, h=5)
    """

    x: float
    y: float
    w: float
    h: float

    def intersect(self, other: Box) -> Box:
        """Return the common part; width or height 0 where there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        right = min(self.x + self.w, other.x + other.w)
        bottom = min(self.y + self.h, other.y + other.h)
        return Box(x, y, max(right - x, 0), max(bottom - y, 0))
