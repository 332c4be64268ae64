"""The patch store: a grid's tiles, and all that was computed from them, in one Zarr v3 group.

::

    store.zarr/
      columns, rows     int32 (n,)             the grid; its geometry is in the attributes
      unreadable        bool (n,)              tiles that the slide could not give; no file: none
      pixels            uint8 (n, h, w, 3)     when kept: one chunk a patch, 256 patches a shard
      probabilities     float32 (n, k)         one file every 256 tiles
      features          float16 (n, d)         likewise
      attention         float32 (n,)           likewise

| module | what it is |
|---|---|
| `patches` | `PatchStore`: the group, and which shards are missing |
| `pixels` | the array of patches: encoded, written a shard at a time, read in any order |
| `verbatim` | the slide's own JPEG tiles, copied |
| `shards` | shard files: offsets, lengths, checksum |
| `codec` | `wsi.jpeg`, the codec by which Zarr reads JPEG patches |
"""

from __future__ import annotations

from wsi.store.lazy import slide_of
from wsi.store.patches import PatchStore
from wsi.store.pixels import KINDS, SHARD_TILES, check_kind, pixel_bytes
from wsi.store.verbatim import copy_tiles, stored_tiles

__all__ = ["KINDS", "SHARD_TILES", "PatchStore", "check_kind", "copy_tiles", "pixel_bytes", "slide_of", "stored_tiles"]
