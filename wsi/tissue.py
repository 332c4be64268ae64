"""Tissue detection at low resolution, and exact areas of tissue.

Stained tissue is *coloured*; glass, dust, shadows and coverslip edges are grey. So colours are balanced on the slide's
own glass, and tissue is where the optical density differs between the channels (Lambert-Beer: the difference grows with
the amount of stain). Otsu's threshold is used within a range in which tissue is known to begin: a blank slide stays
empty, and a slide full of tissue is not divided. Marker ink differs from stain by ratios of the three densities that
H&E and DAB do not reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage
from skimage.filters import threshold_otsu

from wsi.errors import SlideError
from wsi.files import opened_image
from wsi.slide.base import U8, Slide
from wsi.units import Box, Mpp

Bool2d = npt.NDArray[np.bool_]
Float2d = npt.NDArray[np.float32]

#: A mask has at most this many pixels; a larger slide gets coarser ones.
_MAX_MASK_PX = 16_000_000
#: A small region gets finer pixels, up to this many along its longer side (but no finer than the slide's).
_MIN_SIDE_PX = 256

#: Added to every intensity before the logarithm, so that noise in near-black pixels does not look like colour.
_DARK_OFFSET = 16.0
#: Range of the threshold on the difference between channel densities. Below is compression noise, above is tissue
#: (medians in public H&E tiles: fat 0.04, including its empty cells; stroma 0.16; tumour 0.19).
_CHROMA_RANGE = (0.02, 0.05)
#: Densities of tissue differ by at least this fraction of their mean; those of grey dust and shadows do not.
_MIN_RELATIVE_CHROMA = 0.15

#: A scanner's black: every channel below the first, and channels no further apart than the second (8-bit levels).
_BLACK_LEVEL, _BLACK_SPREAD = 48, 16


@dataclass(frozen=True)
class TissueConfig:
    """Parameters of tissue detection.

    Attributes
    ----------
    mpp : float
        Microns per mask pixel. Coarser on slides that are themselves coarser or would have more than 16 Mpx, finer on
        regions of less than 256 px.
    min_area_um2 : float
        Smaller pieces are dropped as debris. On a region of less than 400 times this area: 1/400 of the region.
    min_hole_um2 : float
        Smaller holes (vessels, glands, fat cells) count as tissue.
    exclude_pen : bool
        Exclude tissue under marker ink (blue, green, red, black). Turn off for stains as green or blue as ink
        (trichrome, Alcian blue).

    Examples
    --------
    >>> TissueConfig(mpp=4.0).min_area_um2
    10000.0
    """

    mpp: float = 8.0
    min_area_um2: float = 10_000.0
    min_hole_um2: float = 30_000.0
    exclude_pen: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise SlideError(f"tissue mpp={self.mpp:g}", "the resolution must be positive microns per pixel")
        for name in ("min_area_um2", "min_hole_um2"):
            if not getattr(self, name) >= 0:
                raise SlideError(f"{name}={getattr(self, name):g}", "the area must not be negative")


@dataclass(frozen=True, eq=False)
class TissueMask:
    """The tissue of one slide.

    Attributes
    ----------
    mask : bool (h, w)
        True where there is tissue.
    pen : bool (h, w)
        True where there is marker ink.
    box : Box
        The level-0 area covered; a mask pixel is ``box.w / w`` by ``box.h / h`` level-0 pixels.
    mpp : Mpp
        Microns per level-0 pixel.
    luminance : float, optional
        Median luminance of the overview image, 0 to 255 (ITU-R BT.601), without pure white, which marks areas that were
        not scanned; None if there is no such image.

    Examples
    --------
    >>> left_half = np.zeros((2, 4), bool)
    >>> left_half[:, :2] = True
    >>> tissue = TissueMask(left_half, ~left_half, Box(0, 0, 400, 200), Mpp(0.5, 0.5))
    >>> tissue.fraction(np.array([[150.0, 0.0, 100.0, 200.0], [300.0, 0.0, 100.0, 100.0]]))
    array([0.5, 0. ])
    >>> tissue.area_mm2
    0.01
    >>> [polygon.bounds for polygon in tissue.outlines()]
    [(0.0, 0.0, 200.0, 200.0)]
    """

    mask: Bool2d
    pen: Bool2d
    box: Box
    mpp: Mpp
    luminance: float | None = None

    @property
    def dark_field(self) -> str:
        """A warning if the slide is too dark for brightfield, else an empty string."""
        if self.luminance is None or self.luminance >= _BLACK_LEVEL:
            return ""
        what = "it looks like fluorescence or another dark-field image, which this package does not score"
        return f"no tile holds tissue, and {what}: its median luminance is {self.luminance:.0f} of 255"

    @property
    def area_mm2(self) -> float:
        """Area of the tissue in square millimetres."""
        return self.mpp.area_um2(float(np.count_nonzero(self.mask)) * self._pixel[0] * self._pixel[1]) / 1e6

    def fraction(self, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the fraction of each box that is tissue.

        Exact for any position: between pixel corners, the summed-area table of a pixel image is bilinear.

        Parameters
        ----------
        boxes : float64 (n, 4)
            x, y, w, h in level-0 pixels; may be fractional. Outside the mask there is no tissue.

        Returns
        -------
        float64 (n,)
            Between 0 and 1.

        Raises
        ------
        ValueError
            The shape is not (n, 4), or a side is not positive.

        References
        ----------
        F. C. Crow, "Summed-area tables for texture mapping", SIGGRAPH 1984.
        """
        boxes = np.asarray(boxes, np.float64)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not (boxes[:, 2:] > 0).all():
            raise ValueError(f"boxes must be (n, 4) with positive sides, got {boxes.shape}")
        px, py = self._pixel
        x, y = (boxes[:, 0] - self.box.x) / px, (boxes[:, 1] - self.box.y) / py
        w, h = boxes[:, 2] / px, boxes[:, 3] / py
        covered = self._below(x + w, y + h) - self._below(x, y + h) - self._below(x + w, y) + self._below(x, y)
        return np.clip(covered / (w * h), 0.0, 1.0)

    def outlines(self) -> list[shapely.Polygon]:
        """Return the outline of each piece of tissue, along the edges of mask pixels.

        Returns
        -------
        list of shapely.Polygon
            In level-0 pixels; valid, with holes; largest first. Pixels that share an edge are one piece.
        """
        scale, shift = np.array(self._pixel), np.array([self.box.x, self.box.y])
        return [shapely.transform(p, lambda xy: xy * scale + shift) for p in mask_polygons(self.mask)]

    @property
    def _pixel(self) -> tuple[float, float]:
        """Width and height of a mask pixel in level-0 pixels."""
        return self.box.w / self.mask.shape[1], self.box.h / self.mask.shape[0]

    @cached_property
    def _sums(self) -> npt.NDArray[np.int32]:
        """Summed-area table: tissue pixels above and left of each pixel corner, (h + 1, w + 1)."""
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int32)
        np.cumsum(self.mask, axis=0, dtype=np.int32, out=sums[1:, 1:])
        np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
        return sums

    def _below(self, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Tissue area in [0, x) x [0, y), in mask pixels."""
        h, w = self.mask.shape
        x, y = np.clip(x, 0, w), np.clip(y, 0, h)
        i, j = np.minimum(y.astype(np.intp), h - 1), np.minimum(x.astype(np.intp), w - 1)
        s, v, u = self._sums, y - i, x - j
        top = s[i, j] * (1 - u) + s[i, j + 1] * u
        bottom = s[i + 1, j] * (1 - u) + s[i + 1, j + 1] * u
        return np.asarray(top * (1 - v) + bottom * v, np.float64)


def tissue_of(slide: Slide, config: TissueConfig | None = None, mask: str | None = None) -> TissueMask:
    """Return ``tissue_in_image(mask)`` if a mask is given, else ``find_tissue``."""
    return tissue_in_image(mask, slide) if mask else find_tissue(slide, config)


def tissue_in_image(path: str, slide: Slide) -> TissueMask:
    """Take the tissue from a mask image (PNG, TIFF or the like) of the whole slide: tissue is where it is not black.

    It may have any size, but must have the slide's aspect ratio (to one pixel or 1 %). Raises SlideError if it has
    not, or cannot be read as an image.
    """
    try:
        with opened_image(path) as image:
            mask = np.asarray(image.convert("RGB"), np.uint8).max(axis=2) > 0
    except (FileNotFoundError, ValueError) as error:
        remedy = "Give a PNG or TIFF of a few megapixels"
        raise SlideError(path, f"is no mask that can be read ({error})", remedy) from error
    (h, w), (width, height) = mask.shape, slide.size
    if abs(w * height / width - h) > max(1.0, 0.01 * h):
        what = f"is {w} x {h} px, and the slide {width} x {height}: not the same shape"
        raise SlideError(path, what, "A mask covers the whole level-0 plane of its slide")
    return TissueMask(mask, np.zeros_like(mask), Box(0, 0, width, height), slide.mpp)


def find_tissue(slide: Slide, config: TissueConfig | None = None) -> TissueMask:
    """Find the tissue of a brightfield slide.

    Parameters
    ----------
    slide : Slide
        Read once, at low resolution, within ``slide.bounds``.
    config : TissueConfig, optional

    Returns
    -------
    TissueMask
        Empty if the slide shows no tissue.

    Raises
    ------
    SlideUnreadable
        The file cannot be read at all.

    Notes
    -----
    Areas that are damaged at low resolution are read from finer levels; those damaged at all levels count as tissue.

    References
    ----------
    Optical density: Ruifrok and Johnston, Anal Quant Cytol Histol 23 (2001) 291. Threshold: Otsu, IEEE Trans SMC 9
    (1979) 62.

    Examples
    --------
    >>> from wsi.slide import open_slide
    >>> with open_slide("slide.svs") as slide:           # doctest: +SKIP
    ...     tissue = find_tissue(slide)
    ...     keep = tissue.fraction(grid.boxes()) >= 0.5
    """
    config = config or TissueConfig()
    box = slide.bounds
    size_um = box.w * slide.mpp.x, box.h * slide.mpp.y
    mpp = min(config.mpp, max(size_um) / _MIN_SIDE_PX)
    mpp = max(mpp, math.sqrt(size_um[0] * size_um[1] / _MAX_MASK_PX))
    # Never finer than the slide, along either axis.
    w, h = (max(1, min(round(side / mpp), math.floor(px))) for side, px in zip(size_um, (box.w, box.h), strict=True))
    rgb, unknown = _overview(slide, box, w, h)
    pixel_um = size_um[0] / w
    mask, pen = _segment(rgb, pixel_um, config)
    mask |= unknown  # possibly tissue: these tiles are tried, and counted as unreadable
    sample = rgb[::4, ::4]
    scanned = sample[(sample < 255).any(axis=2)]
    luminance = float(np.median(scanned @ np.array([0.299, 0.587, 0.114], np.float32))) if len(scanned) else None
    return TissueMask(mask, pen, box, slide.mpp, luminance)


def _overview(slide: Slide, box: Box, w: int, h: int) -> tuple[U8, Bool2d]:
    """Read an image of `box`, uint8 (h, w, 3), using finer levels where its level is damaged.

    Also return where all levels are damaged, bool (h, w).
    """
    damage: list[Box] = []
    rgb, unknown = slide.read(box, (w, h), damage=damage), np.zeros((h, w), np.bool_)
    px, py = box.w / w, box.h / h
    level = slide.level_for(min(px, py))
    for bad in damage:
        left, right = max(0, math.floor((bad.x - box.x) / px)), min(w, math.ceil((bad.x + bad.w - box.x) / px))
        top, bottom = max(0, math.floor((bad.y - box.y) / py)), min(h, math.ceil((bad.y + bad.h - box.y) / py))
        if left >= right or top >= bottom:
            continue
        part = Box(box.x + left * px, box.y + top * py, (right - left) * px, (bottom - top) * py)
        for finer in range(level - 1, -1, -1):
            still: list[Box] = []
            pixels = slide.read(part, (right - left, bottom - top), damage=still, level=finer)
            if not still:
                rgb[top:bottom, left:right] = pixels
                break
        else:
            unknown[top:bottom, left:right] = True
    return rgb, unknown


def mask_polygons(mask: Bool2d) -> list[shapely.Polygon]:
    """Return the outline of each edge-connected piece of a mask, bool (h, w), along pixel edges.

    Polygons are valid, with holes, in pixels from the top left corner; sorted by decreasing area, then by x and y.

    Examples
    --------
    >>> ring = np.pad(np.zeros((1, 1), bool), 1, constant_values=True)
    >>> [(polygon.area, len(polygon.interiors)) for polygon in mask_polygons(ring)]
    [(8.0, 1)]
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    # Piece by piece: the union of a hundred thousand specks that touch at corners would take minutes.
    order = np.argsort(labels := ndimage.label(mask)[0][rows, starts], kind="stable")
    runs = np.split(shapely.box(starts, rows, stops, rows + 1)[order], np.flatnonzero(np.diff(labels[order])) + 1)
    pieces = [run[0] if len(run) == 1 else shapely.union_all(run) for run in runs if len(run)]
    # At integer coordinates, a tolerance of 0 removes exactly the collinear points.
    return sorted(shapely.simplify(pieces, 0.0), key=lambda p: (-p.area, *p.bounds))


def _segment(rgb: U8, pixel_um: float, config: TissueConfig) -> tuple[Bool2d, Bool2d]:
    """Return tissue and ink of an image with pixels of `pixel_um`."""
    # Channel by channel: a reduction along an axis of length 3 is ten times slower.
    channels = [*rgb.transpose(2, 0, 1)]
    darkest, brightest = np.minimum.reduce(channels), np.maximum.reduce(channels)
    density = _optical_density(rgb, _glass_colour(rgb, darkest, brightest))
    density = ndimage.gaussian_filter(density, (0, sigma := min(1.0, 8.0 / pixel_um), sigma))
    mean = density.mean(axis=0)
    chroma = density.max(axis=0) - density.min(axis=0)

    black = _opened((brightest < _BLACK_LEVEL) & (brightest - darkest < _BLACK_SPREAD), _px(16.0, pixel_um))
    pen, rim = np.zeros_like(black), max(1, _px(24.0, pixel_um))
    if config.exclude_pen:
        # Black connected to the image's border is the scanner's, not a marker's; both are excluded.
        pen = _ink(density, mean, chroma, pixel_um) & ~_grown(_components(black, seeds=_frame(black.shape)), rim)
    # A stroke has a blurred rim, too faint for ink but coloured enough for tissue.
    excluded = _grown(pen | black, rim)

    low, high = _CHROMA_RANGE
    otsu = threshold_otsu(chroma)  # type: ignore[no-untyped-call]
    tissue = (chroma > np.clip(otsu, low, high)) & (chroma > _MIN_RELATIVE_CHROMA * mean) & ~excluded
    # Closing joins tears of a cell or two; opening removes threads and coloured edges.
    tissue = _opened(~_opened(~tissue, _px(20.0, pixel_um)), min(1, _px(8.0, pixel_um))) & ~excluded
    holes = ndimage.binary_fill_holes(tissue) & ~tissue
    tissue |= holes & ~_components(holes, math.ceil(config.min_hole_um2 / pixel_um**2)) & ~excluded
    min_area_um2 = min(config.min_area_um2, tissue.size * pixel_um**2 / 400)
    tissue = _components(tissue, math.ceil(min_area_um2 / pixel_um**2))
    if pen.any():  # drop pieces that are only the halo of a stroke
        far = tissue & ~_grown(pen, _px(250.0, pixel_um))
        tissue = _components(tissue, seeds=far)
    return tissue, pen


def _glass_colour(rgb: U8, darkest: U8, brightest: U8) -> npt.NDArray[np.float32]:
    """Return the colour of empty glass, float32 (3,): the most common of the brightest greyish pixels."""
    inside = darkest < 255  # pure white: not scanned
    if not inside.any():
        return np.full(3, 255, np.float32)
    top = float(np.percentile(darkest[inside], 99.5))
    glass = rgb[inside & (darkest >= top - 20) & (brightest - darkest <= 20)]
    if top < 160 or len(glass) == 0:
        return np.full(3, 245, np.float32)  # no glass in view
    level = glass.sum(axis=1, dtype=np.int32)
    mode = int(ndimage.gaussian_filter1d(np.bincount(level).astype(np.float64), 3.0).argmax())
    return np.asarray(glass[np.abs(level - mode) <= 6].mean(axis=0), np.float32)


def _optical_density(rgb: U8, glass: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the optical density relative to the glass, float32 (3, h, w), not negative."""
    # A table of all 256 levels of a channel: no logarithm per pixel.
    levels = np.log10((glass[:, None] + _DARK_OFFSET) / (np.arange(256, dtype=np.float32) + _DARK_OFFSET))
    levels = np.maximum(levels, 0).astype(np.float32)
    return np.stack([levels[c][rgb[..., c]] for c in range(3)])


def _ink(density: npt.NDArray[np.float32], mean: Float2d, chroma: Float2d, pixel_um: float) -> Bool2d:
    """Return marker ink: broad strokes with a spot that no stain explains, and all the paler ink around it.

    Haematoxylin, eosin and blood absorb green most, and DAB blue. Green and blue markers absorb red most. A red marker
    absorbs no red, at a density that blood does not reach in a section. A black one absorbs all three. Nuclei resemble
    these over a pixel or two, but not over the width of a stroke. The ratios were set on public H&E patches of 207
    patients, and take none of their tissue for ink. Common red markers count as tissue: clots of three patients have
    the same colour (186, 56, 69; 203, 58, 67 on glass of 243), and losing tissue is worse.
    """
    r, g, b = density
    # Haematoxylin does not exceed 0.64 at 8 um/px: the denser a blue, the more certainly it is ink.
    dark_blue = ((r > 0.5) & (b < 0.3 * r) & (g < 0.95 * r)) | ((r > 0.65) & (b < 0.45 * r) & (g < r))
    markers = (  # green, blue, red, black: (possibly pale ink, certainly ink)
        ((r - g > 0.05) & (r > b) & (b > 0.8 * g), (r - g > 0.12) & (r > 1.3 * b) & (b > 0.8 * g)),
        (
            (r > 0.15) & (b < 0.35 * r) & (g < 0.9 * r) | dark_blue,
            (r > 0.35) & (b < 0.2 * r) & (g < 0.85 * r) | dark_blue,
        ),
        ((g > 0.15) & (r < 0.2 * g) & (b > 0.6 * g), (g > 0.55) & (r < 0.12 * g) & (b > 0.6 * g)),
        ((mean > 0.34) & (chroma < 0.6 * mean) | (mean > 0.65), (mean > 0.5) & (chroma < 0.42 * mean)),
    )
    ink = np.zeros(r.shape, np.bool_)
    for pale, sure in markers:
        strokes = _components(_opened(pale, _px(24.0, pixel_um)), math.ceil(50_000 / pixel_um**2))
        ink |= _components(strokes, seeds=sure, min_seeds=math.ceil(5_000 / pixel_um**2))
    return ink


def _components(mask: Bool2d, min_px: int = 1, *, seeds: Bool2d | None = None, min_seeds: int = 1) -> Bool2d:
    """Return the edge-connected pieces of `mask` with at least `min_px` pixels and `min_seeds` pixels of `seeds`."""
    labels, n = ndimage.label(mask)
    keep = np.bincount(labels.ravel(), minlength=n + 1) >= min_px
    if seeds is not None:
        keep &= np.bincount(labels[seeds], minlength=n + 1) >= min_seeds
    keep[0] = False
    return np.asarray(keep[labels])


def _px(length_um: float, pixel_um: float) -> int:
    """Return `length_um` in mask pixels, rounded."""
    return round(length_um / pixel_um)


def _grown(mask: Bool2d, radius: int) -> Bool2d:
    """Dilate by a square of 2 * radius + 1 pixels."""
    return np.asarray(ndimage.maximum_filter(mask, 2 * radius + 1, mode="constant", cval=0))


def _opened(mask: Bool2d, radius: int) -> Bool2d:
    """Erode, then dilate; for the erosion, the outside of the image counts as part of `mask`."""
    return _grown(np.asarray(ndimage.minimum_filter(mask, 2 * radius + 1, mode="constant", cval=1)), radius)


def _frame(shape: tuple[int, ...]) -> Bool2d:
    """Return the outermost pixels of an image."""
    frame = np.ones(shape, np.bool_)
    frame[1:-1, 1:-1] = False
    return frame
