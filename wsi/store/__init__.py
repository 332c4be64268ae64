"""The patch store: a grid's tiles, and what was computed from them, in one Zarr v3 group.

::

    store.zarr/
      columns, rows     int32 (n,)             the grid; its geometry is in the attributes
      unreadable        bool (n,)              tiles that cannot be decoded; no file means none
      pixels            uint8 (n, h, w, 3)     if kept: one chunk per patch, 256 patches per shard
      probabilities     float32 (n, k)         one file per 256 tiles
      features          float16 (n, d)         likewise
      attention         float32 (n,)           likewise

| module | what it is |
|---|---|
| `patches` | `PatchStore`: the group, and which of its shards are missing |
| `pixels` | the array of patches: encoded, written a shard at a time, read in any order |
| `verbatim` | copies the slide's own JPEG tiles |
| `shards` | shard files: offsets, lengths, checksum |
| `codec` | `wsi.jpeg`, the codec with which Zarr reads JPEG patches |
| `lazy` | patches as a dask array, cut from the slide if they are not kept |
| `multiscale` | pyramids as OME-Zarr |
"""

from __future__ import annotations

from wsi.store.lazy import slide_of
from wsi.store.patches import PatchStore
from wsi.store.pixels import KINDS, SHARD_TILES, check_kind, pixel_bytes
from wsi.store.verbatim import copy_tiles, stored_tiles

__all__ = ["KINDS", "SHARD_TILES", "PatchStore", "check_kind", "copy_tiles", "pixel_bytes", "slide_of", "stored_tiles"]
