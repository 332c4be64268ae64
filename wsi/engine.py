"""Configuration of a run, and its models. Does not import torch before ``EngineConfig.load``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from wsi.errors import GridError, ModelError, StainError
from wsi.slide import check_reading
from wsi.stain import METHODS, TARGETS
from wsi.stain.range import StainRange
from wsi.store import check_kind
from wsi.tissue import TissueConfig

if TYPE_CHECKING:
    from wsi.nn.checkpoint import Context, ModelConfig
    from wsi.nn.grade import MilModel
    from wsi.nn.patch import PatchModel


@dataclass(frozen=True)
class ScoreConfig:
    """What determines the numbers of a run: the same values on the same slide give the same bytes.

    Attributes
    ----------
    positive : tuple of str
        Classes that the heatmap shows; empty for the model's own.
    threshold : float, optional
        Probability from which a tile is positive; None for the model's own.
    stride_px : int, optional
        Distance between tiles in pixels at the model's mpp; None for adjacent tiles.
    min_tissue : float
        Least share of tissue in a tile that is scored; 0 scores every tile.
    pixels : str
        Storage of the patches: "none", "zstd", "jpeg" or "verbatim" (see ``PatchStore.create``).
    reader, decode : str
        As for ``open_slide``.
    stain : str, optional
        Stain normalisation before the model: "macenko", "vahadane", "ruifrok" or "reinhard"; fitted once a slide.
    stain_target : str
        A name in ``wsi.stain.TARGETS``, an image file, or a saved transform.
    max_unreadable : float
        Share of the tissue that may be undecodable. Such tiles have no score; a slide with more fails.
    tissue : TissueConfig
    context : bool
        Smooth over neighbouring tiles where the model has parameters for it (``wsi.context``).
    explain : bool
        Show Grad-CAM of the top tiles in explained.png; without a MIL head, of the tiles of highest probability. Does
        not affect numbers.
    """

    positive: tuple[str, ...] = ()
    threshold: float | None = None
    stride_px: int | None = None
    min_tissue: float = 0.25
    pixels: str = "none"
    reader: str = "auto"
    decode: str = "auto"
    stain: str | None = None
    stain_target: str = "veta"
    max_unreadable: float = 0.01
    tissue: TissueConfig = field(default_factory=TissueConfig)
    context: bool = True
    explain: bool = False

    def context_of(self, model: ModelConfig) -> Context | None:
        """Return the smoothing parameters of this run; None for no smoothing."""
        return model.context if self.context else None

    def check(self, model: ModelConfig) -> None:
        """Refuse settings that no slide can be scored with, such as an unknown class or a stride below 1."""
        unknown = [name for name in self.positive if name not in model.class_names]
        if unknown:
            known = ", ".join(model.class_names)
            raise ModelError(
                f"positive={unknown[0]!r}", f"{model.folder.resolve().name} has no such class", f"Its classes: {known}"
            )
        check_reading(self.reader, self.decode)
        check_kind(self.pixels)
        if self.stain is not None and self.stain not in METHODS:
            raise StainError(f"stain={self.stain!r}", "no such method", f"Known methods: {', '.join(METHODS)}")
        if self.stain_target not in TARGETS and not Path(self.stain_target).is_file():
            known = ", ".join(TARGETS)
            raise StainError(f"stain target {self.stain_target!r}", "no such target", f"Known: {known}; or name a file")
        if self.stride_px is not None and self.stride_px < 1:
            raise GridError(f"stride={self.stride_px}", "the stride must be at least 1 px")
        for name, value in (
            ("threshold", self.threshold),
            ("min_tissue", self.min_tissue),
            ("max_unreadable", self.max_unreadable),
        ):
            if value is not None and not 0 <= value <= 1:
                raise GridError(f"{name}={value:g}", "must be from 0 to 1")


@dataclass(frozen=True)
class Engine:
    """The models of a run and its resources, which do not affect the numbers (see ``score_tiles``)."""

    model: PatchModel
    mil: MilModel | None = None
    batch_size: int = 64
    threads: int = 4

    @cached_property
    def stain_range(self) -> StainRange | None:
        """Stain range of the MIL head's training slides, or else of the patch model's; None where neither has one."""
        of_head = None if self.mil is None else StainRange.read(self.mil.config.folder)
        return of_head or StainRange.read(self.model.config.folder)


@dataclass(frozen=True)
class EngineConfig:
    """The models and resources of a run; ``load`` makes an ``Engine``, in this or another process.

    Attributes
    ----------
    model : str
        A name, a folder, or "hf-hub:OWNER/NAME".
    mil : str, optional
        MIL head: a name, a folder, or "none"; default: the one inside the model's folder, if there is one.
    device : {"auto", "cpu", "cuda"}
    precision : {"auto", "float32", "bfloat16"}
    torchscript : bool
        Allow TorchScript weights, which run code.
    batch_size : int
        Patches a forward pass.
    threads : int
        Reader threads.

    Examples
    --------
    >>> engine = EngineConfig("idc-breast", device="cpu").load()             # doctest: +SKIP
    """

    model: str
    mil: str | None = None
    device: str = "auto"
    precision: str = "auto"
    torchscript: bool = False
    batch_size: int = 64
    threads: int = 4

    def load(self) -> Engine:
        """Load the models.

        Raises ModelError where there is no such model, it or its stain range is damaged, or the head belongs to another
        one.
        """
        from wsi.nn.grade import load_mil_model
        from wsi.nn.patch import load_patch_model

        model = load_patch_model(self.model, device=self.device, precision=self.precision, torchscript=self.torchscript)
        inside = model.config.folder / "mil"
        mil = str(inside) if self.mil is None and (inside / "config.json").is_file() else self.mil
        head = None if mil in (None, "none") else load_mil_model(str(mil), model)
        engine = Engine(model, head, batch_size=self.batch_size, threads=self.threads)
        _ = engine.stain_range  # a damaged one is refused before the first slide
        return engine
