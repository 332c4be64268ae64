"""PatchStore: the Zarr group, and which of its shards exist.

Values are written in shards of 256 tiles: one file per shard and array, which gets its final name only when it is
complete. So a kill loses at most the shard being computed, and what has no file is still to be computed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from wsi.errors import ConfigMismatch, StoreError
from wsi.grid import TileGrid
from wsi.store.codec import JpegCodec
from wsi.store.lazy import lazy_patches
from wsi.store.pixels import SHARD_TILES, U8, Pixels, check_kind
from wsi.store.shards import MISSING_REMEDY

if TYPE_CHECKING:
    import dask.array

    from wsi.slide import Slide

LAYOUT = 2

Array = npt.NDArray[Any]


class PatchStore:
    """A grid's patches, and what was computed from them, on disk.

    Attributes
    ----------
    path : Path
    grid : TileGrid
    attributes : dict
        As given to ``create``: identity of slide, model, configuration.
    pixels : str
        How the patches are kept: one of ``wsi.store.KINDS``.

    Examples
    --------
    >>> from wsi.units import Mpp
    >>> grid = TileGrid.cover((1000, 1000), slide_mpp=Mpp(0.5, 0.5), mpp=1.0, tile_px=100)
    >>> store = PatchStore.create("out/store.zarr", grid, {"probabilities": ((2,), "float32")})  # doctest: +SKIP
    >>> for shard in store.missing("probabilities"):                                             # doctest: +SKIP
    ...     store.write(shard, {"probabilities": np.full((len(store.tiles(shard)), 2), 0.5, np.float32)})
    """

    def __init__(self, path: Path, group: zarr.Group, grid: TileGrid) -> None:
        self.path = path
        self.grid = grid
        self.attributes: dict[str, Any] = dict(group.attrs["wsi"])  # type: ignore[arg-type]
        kept = self.attributes["pixels"]
        self.pixels: str = kept["kind"]
        codec = JpegCodec(kept["quality"], kept["subsampling"])
        self._arrays: dict[str, Any] = {
            # A shard of only fill values must be written too: a missing file means "not computed".
            name: array.with_config({"write_empty_chunks": True})
            for name, array in sorted(group.arrays())
            if name not in ("columns", "rows")
        }
        self._pixels = Pixels(path / "pixels", len(grid), grid.tile_px, self.pixels, codec)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        grid: TileGrid,
        arrays: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        pixels: str = "none",
        attributes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Create an empty store; it appears under its name only when it is complete.

        Parameters
        ----------
        path : path
            Must not exist.
        grid : TileGrid
        arrays : mapping of name to (shape of one row, dtype)
            What will be computed for each tile.
        pixels : {"none", "zstd", "jpeg", "verbatim"}
            How the patches are kept: not at all, lossless, as JPEG (quality 90, 4:2:0), or as the slide's own JPEG
            tiles (see ``copy_tiles``).
        attributes : mapping, optional
            JSON-able provenance.

        Raises
        ------
        StoreError
            `path` exists, or `pixels` is unknown.
        OSError
            `path` cannot be written to.
        """
        path = Path(path)
        check_kind(pixels)
        if path.exists():
            raise StoreError(path, "is there already", "Open it, or choose another place")
        codec = JpegCodec()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            geometry = {"tile": grid.tile, "stride": grid.stride, "tile_px": grid.tile_px, "mpp": grid.mpp}
            ours = {"layout": LAYOUT, "grid": geometry, "pixels": {"kind": pixels, **asdict(codec)}}
            group = zarr.create_group(
                LocalStore(draft), zarr_format=3, attributes={"wsi": {**ours, **(attributes or {})}}
            )
            n = len(grid)
            for name, values in (("columns", grid.columns), ("rows", grid.rows)):
                array = group.create_array(name, shape=(n,), dtype="int32", chunks=(max(n, 1),))
                array[:] = values
            if pixels != "none":
                Pixels.create(group, n, grid.tile_px, pixels, codec)
            for name, (row, dtype) in {"unreadable": ((), "bool"), **arrays}.items():
                _create_array(group, name, n, row, dtype, {})
            draft.rename(path)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise StoreError(path, "was made by another run just now", "Let that run end first") from error
            raise
        return cls.open(path)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        grid: TileGrid,
        arrays: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        pixels: str = "none",
        attributes: Mapping[str, Any],
    ) -> Self:
        """Open the store of an earlier run with the same grid, arrays and attributes; ``create`` it if there is none.

        Raises
        ------
        ConfigMismatch
            It holds other arrays, or was created with other attributes; the difference is named.
        StoreError
            It holds other tiles, or is damaged.
        """
        path, remedy = Path(path), "Delete it to begin it anew, or choose another folder"
        if not path.exists():
            return cls.create(path, grid, arrays, pixels=pixels, attributes=attributes)
        store = cls.open(path)
        asked = sorted({*arrays, "unreadable", *(["pixels"] if pixels != "none" else [])})
        first = [name for name in store.arrays if not store.about(name)]  # without arrays added later
        if asked != first or pixels != store.pixels:
            what = f"holds {', '.join(first)} (pixels: {store.pixels}), and others are asked for"
            raise ConfigMismatch(path, what, remedy)
        changed = [key for key in attributes if store.attributes.get(key) != attributes[key]]
        if changed:
            differences = ", ".join(
                f"{key} ({json.dumps(store.attributes.get(key))}, now {json.dumps(attributes[key])})" for key in changed
            )
            raise ConfigMismatch(path, f"was made with another {differences}", remedy)
        same_tiles = np.array_equal(store.grid.columns, grid.columns) and np.array_equal(store.grid.rows, grid.rows)
        geometry = [(each.tile, each.stride, each.tile_px) for each in (store.grid, grid)]
        if not same_tiles or geometry[0] != geometry[1]:
            raise StoreError(path, "holds other tiles than this slide gives", remedy)
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store.

        Raises
        ------
        StoreError
            It does not exist, has another layout, or is damaged.
        """
        path = Path(path)
        remedy = "Delete it and run again: it will be computed anew"
        if not path.is_dir():  # Zarr would create the folder
            raise StoreError(path, "there is no patch store", "Check the path")
        try:
            group = zarr.open_group(LocalStore(path), mode="r+", zarr_format=3)
            attributes: Any = group.attrs["wsi"]
            if attributes["layout"] != LAYOUT:
                raise StoreError(path, f"has layout {attributes['layout']}, this version reads {LAYOUT}", remedy)
            geometry = attributes["grid"]
            columns, rows = (np.asarray(group[name][:], np.int32) for name in ("columns", "rows"))  # type: ignore[index]
            tile, stride = ((float(w), float(h)) for w, h in (geometry["tile"], geometry["stride"]))
            grid = TileGrid(columns, rows, tile, stride, int(geometry["tile_px"]), float(geometry["mpp"]))
            return cls(path, group, grid)
        except StoreError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, FileNotFoundError) as error:
            raise StoreError(path, f"is damaged or no patch store ({error})", remedy) from error

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle as the path: unpickling opens the store again."""
        return type(self).open, (self.path,)

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def arrays(self) -> list[str]:
        """Names of the arrays that the store holds."""
        return list(self._arrays)

    @property
    def shards(self) -> range:
        """Numbers of all shards, written or not."""
        return range(-(-len(self) // SHARD_TILES))

    def about(self, name: str) -> dict[str, Any]:
        """Return the `about` of an array made by ``add``; {} for the arrays that the store was created with."""
        return dict(self._array(name).attrs.get("wsi", {}))

    def add(self, name: str, row: tuple[int, ...], dtype: str, about: Mapping[str, Any]) -> None:
        """Add an array, or continue with the existing one.

        `row` is the shape of one tile's values; `about`, JSON-able and not empty, is what decides them.

        Raises
        ------
        ConfigMismatch
            The existing array has another shape, dtype or `about`; the difference is named.
        """
        if name not in self._arrays:
            group = zarr.open_group(LocalStore(self.path), mode="r+", zarr_format=3)
            added = _create_array(group, name, len(self), row, dtype, {"wsi": dict(about)})
            self._arrays[name] = added.with_config({"write_empty_chunks": True})
        found, array = self.about(name), self._array(name)
        changed = [key for key in {**found, **about} if found.get(key) != json.loads(json.dumps(about.get(key)))]
        if array.shape[1:] != row or array.dtype != dtype or changed:
            what = f"is there with {array.dtype} {array.shape[1:]}" + "".join(
                f", {key} {json.dumps(found.get(key))}, now {json.dumps(about.get(key))}" for key in sorted(changed)
            )
            raise ConfigMismatch(self.path / name, what, "Delete that folder to compute it anew")

    def tiles(self, shard: int) -> range:
        """Return the tiles of a shard."""
        return range(shard * SHARD_TILES, min((shard + 1) * SHARD_TILES, len(self)))

    def missing(self, *names: str) -> list[int]:
        """Return the shards that are missing for any of the named arrays (default: all but ``unreadable``)."""
        there = [self._is_there(name) for name in names or self.arrays if name != "unreadable"]
        return [shard for shard in self.shards if not all(is_there(shard) for is_there in there)]

    def write(self, shard: int, values: Mapping[str, Array]) -> None:
        """Write one whole shard of the named arrays.

        A tile once written ``unreadable`` stays so: its numbers may be NaN, meaning null, and its pixels read as white.

        Parameters
        ----------
        values : mapping of name to array (tiles of the shard, ...)

        Raises
        ------
        StoreError
            An unknown name, another shape, or values that are not finite as stored (except NaN of unreadable tiles).
        OSError
            The store cannot be written to; an earlier shard stays as it was.
        """
        tiles = self.tiles(shard)
        part = slice(tiles.start, tiles.stop)
        arrays = {name: self._array(name) for name in values}
        for name, rows in values.items():
            takes = (len(tiles), *arrays[name].shape[1:])
            if rows.shape != takes:
                raise StoreError(f"{self.path}/{name}", f"shard {shard} takes {takes}, not {rows.shape}")
        unreadable: npt.NDArray[np.bool_] = np.asarray(self._array("unreadable")[part])
        if "unreadable" in values:  # first, so that every NaN on disk has its mark
            unreadable = unreadable | values["unreadable"].astype(bool)
            arrays.pop("unreadable")[part] = unreadable
        for name, array in arrays.items():
            if name == "pixels":
                encoded = self.encode(values[name])
                self.keep(shard, [None if unreadable[i] else chunk for i, chunk in enumerate(encoded)])
                continue
            with np.errstate(over="ignore"):
                stored = values[name].astype(array.dtype, copy=False)
            null = np.isnan(stored) & unreadable.reshape(-1, *[1] * (stored.ndim - 1))
            if not (np.isfinite(stored) | null).all():
                raise StoreError(f"{self.path}/{name}", f"values of shard {shard} are not finite as {array.dtype}")
            array[part] = stored

    def put(self, name: str, values: Array) -> None:
        """Write an array for all tiles at once; see ``write``."""
        if len(values) != len(self):
            raise StoreError(f"{self.path}/{name}", f"there are {len(self)} tiles, not {len(values)}")
        for shard in self.shards:
            tiles = self.tiles(shard)
            self.write(shard, {name: values[tiles.start : tiles.stop]})

    def get(self, name: str) -> Array:
        """Return an array for all tiles.

        Raises
        ------
        StoreError
            Part of it is missing or damaged.
        """
        array = self._array(name)
        missing = self.missing(name)
        if missing:
            raise StoreError(f"{self.path}/{name}", f"shards {missing[:5]} are missing", MISSING_REMEDY)
        if name == "pixels":
            return self.read(range(len(self)))
        try:
            return np.asarray(array[:])
        except (RuntimeError, ValueError) as error:
            remedy = "Delete the store and run again"
            raise StoreError(f"{self.path}/{name}", f"is damaged ({error})", remedy) from error

    def encode(self, rgb: U8, threads: int = 1) -> list[bytes]:
        """Encode patches, uint8 (m, h, w, 3), for ``keep``."""
        self._array("pixels")
        if self.pixels == "verbatim":
            raise StoreError(self.path, "keeps the slide's own JPEG tiles", "Fill it with copy_tiles")
        return self._pixels.encode(rgb, threads)

    def keep(self, shard: int, chunks: Sequence[bytes | None]) -> None:
        """Write the encoded pixels of one whole shard; None, for unreadable tiles, reads as white."""
        self._array("pixels")
        if (takes := len(self.tiles(shard))) != len(chunks):
            raise StoreError(f"{self.path}/pixels", f"shard {shard} takes {takes} patches, not {len(chunks)}")
        self._pixels.put(shard, chunks)

    def read(self, rows: Sequence[int] | npt.NDArray[np.integer], out: U8 | None = None) -> U8:
        """Read kept patches in any order; safe from many threads and in forked or spawned processes.

        One core reads several thousand a second, one by one and shuffled.

        Parameters
        ----------
        rows : sequence of int (m,)
            Indices of tiles in the grid, in any order and with repeats.
        out : uint8 (m, h, w, 3), contiguous, optional
            Written in place, and returned.

        Returns
        -------
        uint8 (m, h, w, 3)
            RGB; white where a tile is unreadable (see ``get("unreadable")``).

        Raises
        ------
        StoreError
            No pixels are kept, there is no such row, a shard is missing, or a patch is damaged.
        ValueError
            `out` has another shape, dtype or memory layout.

        Examples
        --------
        >>> import random
        >>> order = random.sample(range(len(store)), len(store))             # doctest: +SKIP
        >>> batch = store.read(order[:64])                                   # doctest: +SKIP
        """
        if self.pixels == "none":
            raise StoreError(self.path, "keeps no pixels", "Use dask(), which cuts them from the slide")
        return self._pixels.read(rows, out, lambda row: bool(self._array("unreadable")[row]))

    def batches(self, size: int) -> Iterator[U8]:
        """Yield the kept patches in order, uint8 (`size` or fewer, h, w, 3)."""
        for start in range(0, len(self), size):
            yield self.read(range(start, min(start + size, len(self))))

    def dask(self, slide: Slide | None = None) -> dask.array.Array:
        """Return the patches as a lazy array, uint8 (n, h, w, 3), with one chunk per shard.

        Kept pixels are read from the store. Otherwise each chunk is cut from the slide when and where it is computed
        (stores and slides are pickled as their paths).

        Parameters
        ----------
        slide : Slide, optional
            The slide that the patches were cut from; default: the path in the store's attributes.
        """
        return lazy_patches(self, slide)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            raise StoreError(self.path, f"holds no {name!r}", f"It holds {', '.join(self.arrays)}")
        return self._arrays[name]

    def _is_there(self, name: str) -> Callable[[int], bool]:
        array = self._array(name)
        if name == "pixels":
            return self._pixels.is_whole
        trailing = (0,) * (array.ndim - 1)
        encode = array.metadata.encode_chunk_key
        return lambda shard: _has_bytes(self.path / name / encode((shard, *trailing)))


def _create_array(
    group: zarr.Group, name: str, n: int, row: tuple[int, ...], dtype: str, attributes: dict[str, Any]
) -> Any:
    chunks = SHARD_TILES, *(max(side, 1) for side in row)
    return group.create_array(
        name, shape=(n, *row), dtype=dtype, chunks=chunks, compressors=ZstdCodec(level=1), attributes=attributes
    )


def _has_bytes(path: Path) -> bool:
    """Whether a file exists and is not empty: a power cut may empty a file that was renamed before it was synced."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
