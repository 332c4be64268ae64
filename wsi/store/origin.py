"""The slide that a store's patches were cut from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wsi.errors import StoreError
from wsi.slide import Slide, open_slide

if TYPE_CHECKING:
    from wsi.store.patches import PatchStore


def slide_of(store: PatchStore, path: str | None = None) -> Slide:
    """Open the slide that a store's patches were cut from, as it was read then.

    Parameters
    ----------
    store : PatchStore
    path : str, optional
        Where the slide is now; default: where it was.

    Raises
    ------
    StoreError
        The store names no slide, or it is another.
    SlideError
        It cannot be opened.
    """
    path, facts = path or store.attributes.get("slide_path"), store.attributes.get("slide")
    if path is None or facts is None:
        raise StoreError(store.path, "keeps no pixels and names no slide", "Make it with wsi tile")
    slide = open_slide(path, facts["reader"], mpp=facts["mpp"][0], decode=facts["decode"])
    if list(slide.size) != facts["size"]:
        with slide:
            raise StoreError(store.path, f"is of a slide of {facts['size']}, and {path} has {list(slide.size)}")
    return slide
