"""The two units used everywhere: level-0 pixels (``Box``) and microns per pixel (``Mpp``)."""

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
        """Convert an area from level-0 pixels to square microns."""
        return area_px * self.x * self.y


class Box(NamedTuple):
    """A rectangle in level-0 pixels; the origin is the slide's top left corner, and pixel (0, 0) spans [0, 1) x [0, 1).

    Position and sides may be fractional: 224 px at 0.5 mpp on a slide of 0.2431 mpp are 460.715... level-0 px.

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
        """Return the intersection; its width or height is 0 if there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        right = min(self.x + self.w, other.x + other.w)
        bottom = min(self.y + self.h, other.y + other.h)
        return Box(x, y, max(right - x, 0), max(bottom - y, 0))
