"""What is done to each slide of an archive, in a form that can be sent to another process as JSON."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from wsi import __version__
from wsi.archive.claims import Claim, ClaimLost
from wsi.archive.folder import Row
from wsi.archive.slides import SlideRef
from wsi.engine import EngineConfig, ScoreConfig
from wsi.errors import ConfigMismatch, OutputError, WsiError, is_output_error
from wsi.files import sha256_of
from wsi.result import EXPLAINED, Progress, SlideResult, read_result
from wsi.slide import absolute, fingerprint
from wsi.stain import TARGETS
from wsi.tile import TileConfig, estimate_tiled_bytes, tile_slide
from wsi.tissue import TissueConfig

#: Seconds that a process which does slides may take to end well when it is told to.
END_S = 3.0

#: Slides after which what they left in cycles is collected: matplotlib leaves 6 MB a slide, of so few objects that
#: Python would wait for hundreds; looking takes 9 ms.
_COLLECT = 8
_performed = itertools.count(1)


@dataclass(frozen=True)
class Ready:
    """A job whose models are loaded.

    Attributes
    ----------
    work : callable
        Does a slide, given its place and what is known of it, its own folder, and whom to tell; or goes on where it was
        stopped.
    answers : mapping
        What can be asked of a slide before: "bytes" that its results will take, and for some jobs "triage", how
        urgent it seems.
    configuration : dict
        What decides the results: a results folder is bound to it.
    execution : dict
        What does not.
    """

    work: Callable[[SlideRef, Path, Progress], object]
    answers: Mapping[str, Callable[[SlideRef], float]]
    configuration: dict[str, Any]
    execution: dict[str, Any]


@dataclass(frozen=True)
class ScoreJob:
    """``score_slide`` for each.

    Attributes
    ----------
    engine : EngineConfig
    config : ScoreConfig
    status : str
        Of a finished slide, in the table.
    columns : tuple of str
        The table's columns, by names of result.json.
    """

    engine: EngineConfig
    config: ScoreConfig
    status: ClassVar[str] = "scored"
    columns: ClassVar[tuple[str, ...]] = (
        "grade", "probabilities", "n_tiles", "n_unreadable", "tissue_mm2", "positive_mm2", "positive_alone_mm2",
        "largest_region_um", "mpp", "mpp_source", "flags",
    )  # fmt: skip

    def finished(self, own: Path) -> SlideResult | None:
        """Return what a slide's folder says, or None where something is still to do."""
        result = read_result(own)
        explained = not self.config.explain or (own / EXPLAINED).is_file()
        return result if explained or result is None or not result.numbers["n_tiles"] else None

    def load(self) -> Ready:
        """Load the models; errors are those of ``load_patch_model``, ``ScoreConfig.check`` and ``check_maps``."""
        from wsi.nn.gradcam import check_maps
        from wsi.run import estimate_bytes, explain_slide, score_slide, triage  # torch, which patch stores do without

        engine, config = self.engine.load(), self.config
        config.check(engine.model.config)
        if config.explain:
            check_maps(engine.model)
        numbers = asdict(config)
        unbound = {name: numbers.pop(name) for name in ("max_unreadable", "explain")}  # which decide no number
        del numbers["context"]  # bound below, where the model has one
        said = [asdict(replace(each.config, folder=Path())) for each in (engine.model, engine.mil) if each is not None]
        numbers["model_config"] = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]
        if config.stain is not None and config.stain_target not in TARGETS:
            numbers["stain_target_sha256"] = sha256_of(config.stain_target)
        if engine.stain_range is not None:
            numbers["stain_range"] = engine.stain_range.sha256[:12]
        if engine.model.config.context is not None:
            numbers["context"] = asdict(engine.model.config.context) if config.context else None

        def work(ref: SlideRef, own: Path, progress: Progress) -> None:
            if read_result(own) is not None:  # all that is missing is its explanation
                explain_slide(ref.path, own, engine, config, mpp=ref.mpp, local=ref.local, progress=progress)
                return
            score_slide(
                ref.path, own, engine, config,
                mpp=ref.mpp, mpp_source=ref.mpp_source, mask=ref.mask, local=ref.local, progress=progress,
            )  # fmt: skip

        return Ready(
            work=work,
            answers={
                "bytes": lambda ref: estimate_bytes(ref.path, engine, config, mpp=ref.mpp, mask=ref.mask),
                "triage": lambda ref: triage(ref.path, engine, config, mpp=ref.mpp, mask=ref.mask),
            },
            configuration={
                "model": engine.model.name,
                "model_sha256": engine.model.sha256,
                "mil_sha256": engine.mil.sha256 if engine.mil else None,
                "precision": engine.model.precision,
                "wsi_version": __version__,
                **numbers,
            },
            execution={
                **unbound,
                "device": engine.model.device,
                "batch_size": engine.batch_size,
                "threads": engine.threads,
            },
        )  # fmt: skip


@dataclass(frozen=True)
class TileJob:
    """``tile_slide`` for each."""

    config: TileConfig
    threads: int
    status: ClassVar[str] = "tiled"
    columns: ClassVar[tuple[str, ...]] = (
        "n_tiles", "n_unreadable", "tile_px", "tile_mpp", "pixels", "tissue_mm2", "mpp", "mpp_source", "flags",
    )  # fmt: skip

    def finished(self, own: Path) -> SlideResult | None:
        """Return what a slide's folder says, or None where it is still to do."""
        return read_result(own)

    def load(self) -> Ready:
        """Check the configuration."""
        self.config.check()
        return Ready(
            work=lambda ref, own, progress: tile_slide(
                ref.path, own, self.config,
                threads=self.threads, mpp=ref.mpp, mpp_source=ref.mpp_source, mask=ref.mask, local=ref.local,
                progress=progress,
            ),
            answers={"bytes": lambda ref: estimate_tiled_bytes(ref.path, self.config, mpp=ref.mpp, mask=ref.mask)},
            configuration={"wsi_version": __version__, **asdict(self.config)},
            execution={"threads": self.threads},
        )  # fmt: skip


Job = ScoreJob | TileJob


def to_json(job: Job) -> dict[str, Any]:
    """Describe a job so that ``from_json`` can make it again elsewhere."""
    return {"job": type(job).__name__, **asdict(job)}


def from_json(said: dict[str, Any]) -> Job:
    """Make a job of its description."""
    config = {**said["config"], "tissue": TissueConfig(**said["config"]["tissue"])}
    if said["job"] == "TileJob":
        return TileJob(TileConfig(**config), said["threads"])
    config["positive"] = tuple(config["positive"])
    return ScoreJob(EngineConfig(**said["engine"]), ScoreConfig(**config))


@dataclass(frozen=True)
class Task:
    """One slide: to be done, claimed, with the folder its results go to; or to be asked about.

    Attributes
    ----------
    slide_id : str
    ref : SlideRef
    own : str
        Its folder.
    claim : Claim, optional
        Needed to do it.
    question : str
        What is asked (see ``Ready.answers``); empty where it is to be done.
    """

    slide_id: str
    ref: SlideRef
    own: str
    claim: Claim | None = None
    question: str = ""

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Self:
        """Undo ``dataclasses.asdict``."""
        claim = Claim(**said["claim"]) if said["claim"] else None
        return cls(said["slide_id"], SlideRef(**said["ref"]), said["own"], claim, said["question"])


def is_of(result: SlideResult, ref: SlideRef) -> bool:
    """Whether a result is of this slide, and of its file as it is now, as far as its fingerprint tells."""
    if result.numbers.get("slide") != absolute(ref.path):
        return False
    prints = result.numbers.get("file_fingerprint"), fingerprint(ref.path)
    return None in prints or prints[0] == prints[1]


def perform(ready: Ready, task: Task, progress: Progress) -> dict[str, Any]:
    """Do one slide, or answer about it: the one place where a slide may fail.

    Returns
    -------
    dict
        ``kind`` "done", with the answer as ``value``; or "failed", with ``record``, a row of failures.csv.

    Raises
    ------
    ClaimLost
        Somebody else has taken it over.
    OutputError
        Nothing can be written: going on would be of no use.
    """
    stage, own = "", Path(task.own)

    def watch(name: str, done: int, total: int) -> None:
        nonlocal stage
        if name != stage and task.claim is not None:
            task.claim.confirm()
        stage = name
        progress(name, done, total)

    try:
        watch("open", 0, 0)
        if task.question:
            return {"kind": "done", "value": float(ready.answers[task.question](task.ref))}
        earlier = read_result(own)
        if earlier is not None and not is_of(earlier, task.ref):
            raise ConfigMismatch(
                own,
                "is of another file than lies there now under the slide's name",
                "Delete that folder, or run this slide alone with --force",
            )
        ready.work(task.ref, own, watch)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, WsiError) and is_output_error(error, own.parent):
            raise OutputError.of(error, own.parent) from error
        if isinstance(error, ClaimLost | OutputError):
            raise
        return {"kind": "failed", "record": failure(task, stage or "open", error)}
    finally:
        if next(_performed) % _COLLECT == 0:
            gc.collect()
    return {"kind": "done"}


def failure(task: Task, stage: str, error: Exception) -> Row:
    """Make a row of failures.csv of an exception; one that nobody foresaw shows its traceback."""
    if isinstance(error, WsiError):
        return failure_row(task, stage, f"{error.where}: {error.what}", error.remedy)
    if isinstance(error, UnicodeEncodeError):
        return failure_row(task, stage, f"{task.ref.path}: its path is not UTF-8 text", "Rename it")
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "out of memory" in said.lower():
        return failure_row(task, stage, said, "Lower --batch-size or --threads, or use a machine with more memory")
    if isinstance(error, OSError):
        return failure_row(task, stage, said, "The file system failed: try again, or copy the slide nearer")
    traceback.print_exception(error, file=sys.stderr)  # a bug, or a library's: the table has no room for where
    return failure_row(task, stage, said, "Please report this: it should not happen")


def failure_row(task: Task, stage: str, error: str, remedy: str) -> Row:
    """Make a row of failures.csv."""
    place = {"slide_id": task.slide_id, "slide": absolute(task.ref.path)}
    return {**place, "stage": stage, "error": error, "remedy": remedy}
