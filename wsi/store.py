"""PatchStore: a grid's tiles, and all that was computed from them, in one Zarr v3 group.

::

    store.zarr/
      columns, rows     int32 (n,)             the grid; its geometry is in the attributes
      pixels            uint8 (n, h, w, 3)     when kept: one chunk a patch, 256 patches a shard
      probabilities     float32 (n, k)         one file every 256 tiles
      features          float16 (n, d)         likewise
      attention         float32 (n,)           likewise

Rows are written in shards of 256 tiles, each array's part in one file that appears under its final
name only when it is whole. So a kill at any moment loses at most the shard being computed, and what
is missing is what has no file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from wsi.errors import StoreError
from wsi.grid import TileGrid
from wsi.units import Box

if TYPE_CHECKING:
    import dask.array

    from wsi.slide import Slide

SHARD_TILES = 256
LAYOUT = 1

Array = npt.NDArray[Any]


class PatchStore:
    """A grid's patches and what was computed from them, on disk.

    Attributes
    ----------
    path : Path
    grid : TileGrid
    attributes : dict
        What ``create`` was given: identity of slide, model, configuration.

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
        self._group = group

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        grid: TileGrid,
        arrays: Mapping[str, tuple[tuple[int, ...], str]],
        *,
        pixels: bool = False,
        attributes: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make an empty store; it appears under its name only when it is whole.

        Parameters
        ----------
        path : path
            Must not exist.
        grid : TileGrid
        arrays : mapping of name to (shape of one row, dtype)
            What will be computed for each tile.
        pixels : bool
            Keep the patches themselves, losslessly (zstd).
        attributes : mapping, optional
            JSON-able provenance.

        Raises
        ------
        StoreError
            Something is there already.
        OSError
            The place cannot be written to.
        """
        path = Path(path)
        if path.exists():
            raise StoreError(path, "is there already", "Open it, or choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            geometry = {"tile": grid.tile, "stride": grid.stride, "tile_px": grid.tile_px, "mpp": grid.mpp}
            group = zarr.create_group(
                LocalStore(draft),
                zarr_format=3,
                attributes={"wsi": {"layout": LAYOUT, "grid": geometry, **(attributes or {})}},
            )
            n = len(grid)
            for name, values in (("columns", grid.columns), ("rows", grid.rows)):
                array = group.create_array(name, shape=(n,), dtype="int32", chunks=(max(n, 1),))
                array[:] = values
            everything = dict(arrays)
            if pixels:
                everything["pixels"] = ((grid.tile_px, grid.tile_px, 3), "uint8")
            for name, (row, dtype) in everything.items():
                sharded = name == "pixels"
                group.create_array(
                    name,
                    shape=(n, *row),
                    dtype=dtype,
                    chunks=(1 if sharded else SHARD_TILES, *(max(side, 1) for side in row)),
                    shards=(SHARD_TILES, *row) if sharded else None,
                    compressors=ZstdCodec(level=1),
                    # A shard of nothing but fill values must still leave its file: files are what is done.
                    config={"write_empty_chunks": True},
                )
            draft.rename(path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store.

        Raises
        ------
        StoreError
            It is not there, of another layout, or damaged.
        """
        path = Path(path)
        remedy = "Delete it and run again: it will be computed anew"
        if not path.is_dir():  # opening for writing would make the folder
            raise StoreError(path, "there is no patch store", "Check the path")
        try:
            group = zarr.open_group(LocalStore(path), mode="r+", zarr_format=3)
            attributes: Any = group.attrs["wsi"]
            if attributes["layout"] != LAYOUT:
                raise StoreError(path, f"has layout {attributes['layout']}, this version reads {LAYOUT}", remedy)
            geometry = attributes["grid"]
            grid = TileGrid(
                np.asarray(group["columns"][:], np.int32),  # type: ignore[index]
                np.asarray(group["rows"][:], np.int32),  # type: ignore[index]
                (float(geometry["tile"][0]), float(geometry["tile"][1])),
                (float(geometry["stride"][0]), float(geometry["stride"][1])),
                int(geometry["tile_px"]),
                float(geometry["mpp"]),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, FileNotFoundError) as error:
            raise StoreError(path, f"is damaged or no patch store ({error})", remedy) from error
        return cls(path, group, grid)

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def arrays(self) -> list[str]:
        """Names of what the store holds for each tile."""
        return sorted(set(self._group.array_keys()) - {"columns", "rows"})

    def tiles(self, shard: int) -> range:
        """Return the tiles of a shard."""
        return range(shard * SHARD_TILES, min((shard + 1) * SHARD_TILES, len(self)))

    def missing(self, *names: str) -> list[int]:
        """Return the shards that are not there in full for the named arrays (default: all)."""
        paths = [self._shard_path(name) for name in names or self.arrays]
        n_shards = -(-len(self) // SHARD_TILES)
        return [i for i in range(n_shards) if not all(_is_there(path(i)) for path in paths)]

    def write(self, shard: int, values: Mapping[str, Array]) -> None:
        """Write one whole shard of the named arrays.

        Parameters
        ----------
        shard : int
        values : mapping of name to array (tiles of the shard, ...)

        Raises
        ------
        StoreError
            Values of another shape, unknown to the store, or not finite once stored.
        OSError
            The disk is full, or may not be written to; what was there before stays.
        """
        tiles = self.tiles(shard)
        for name, rows in values.items():
            array = self._array(name)
            if rows.shape != (len(tiles), *array.shape[1:]):
                raise StoreError(
                    f"{self.path}/{name}", f"shard {shard} takes {(len(tiles), *array.shape[1:])}, not {rows.shape}"
                )
            with np.errstate(over="ignore"):
                stored = rows.astype(array.dtype, copy=False)
            if not np.isfinite(stored).all():
                raise StoreError(f"{self.path}/{name}", f"values of shard {shard} are not finite as {array.dtype}")
            array[tiles.start : tiles.stop] = stored

    def put(self, name: str, values: Array) -> None:
        """Write an array for all tiles at once; see ``write``."""
        if len(values) != len(self):
            raise StoreError(f"{self.path}/{name}", f"there are {len(self)} tiles, not {len(values)}")
        for shard in range(-(-len(self) // SHARD_TILES)):
            tiles = self.tiles(shard)
            self.write(shard, {name: values[tiles.start : tiles.stop]})

    def get(self, name: str) -> Array:
        """Return an array for all tiles.

        Raises
        ------
        StoreError
            Part of it was never computed, or is damaged.
        """
        array = self._array(name)
        missing = self.missing(name)
        if missing:
            raise StoreError(
                f"{self.path}/{name}", f"shards {missing[:5]} are missing", "Run the same command again: it resumes"
            )
        try:
            return np.asarray(array[:])
        except (RuntimeError, ValueError) as error:
            raise StoreError(
                f"{self.path}/{name}", f"is damaged ({error})", "Delete the store and run again"
            ) from error

    def batches(self, size: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Give the kept patches in order, uint8 (up to `size`, h, w, 3) a time."""
        array = self._array("pixels")
        for start in range(0, len(self), size):
            yield np.asarray(array[start : start + size])

    def dask(self, slide: Slide | None = None) -> dask.array.Array:
        """Return the patches as a lazy array, uint8 (n, h, w, 3), in chunks of one shard.

        Kept pixels are read from the store; otherwise each chunk is cut from the slide when it is
        computed, in whatever process that happens (slides are pickled by their path).

        Parameters
        ----------
        slide : Slide, optional
            Where the patches were cut from; default: the path the store was made with.
        """
        import dask.array as da

        side = self.grid.tile_px
        if "pixels" in self.arrays:
            kept: dask.array.Array = da.from_array(self._array("pixels"), chunks=(SHARD_TILES, side, side, 3))
            return kept
        # By path: each chunk opens the slide where it is computed.
        (reopen, arguments), boxes = (slide or self._slide()).__reduce__(), self.grid.boxes()

        def cut(block_info: Any = None) -> npt.NDArray[np.uint8]:
            start, stop = block_info[None]["array-location"][0]
            with reopen(*arguments) as opened:
                return np.stack([opened.read(Box(*box), (side, side)) for box in boxes[start:stop].tolist()])

        chunks = (tuple(len(self.tiles(i)) for i in range(-(-len(self) // SHARD_TILES))), (side,), (side,), (3,))
        lazy: dask.array.Array = da.map_blocks(
            cut, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0, 0), np.uint8)
        )
        return lazy

    def _slide(self) -> Slide:
        from wsi.slide import open_slide

        path = self.attributes.get("slide_path")
        if path is None:
            raise StoreError(self.path, "keeps no pixels and names no slide", "Give the slide")
        facts = self.attributes["slide"]
        with open_slide(path, facts["reader"], mpp=facts["mpp"][0], decode=facts["decode"]) as slide:
            return slide

    def _array(self, name: str) -> Any:
        if name not in self.arrays:
            raise StoreError(self.path, f"holds no {name!r}", f"It holds {', '.join(self.arrays)}")
        array: Any = self._group[name]
        return array.with_config({"write_empty_chunks": True})

    def _shard_path(self, name: str) -> Any:
        array = self._array(name)
        trailing = (0,) * (array.ndim - 1)
        encode = array.metadata.encode_chunk_key
        return lambda shard: self.path / name / encode((shard, *trailing))


def _is_there(path: Path) -> bool:
    """A file of no length is what a power cut leaves of one that was renamed before it was synced."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
