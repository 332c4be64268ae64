"""Jobs: what is done to each slide of an archive, in a form that can be sent to another process as JSON."""

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

#: Seconds that a worker may take to end when it is told to.
END_S = 3.0

#: Slides between garbage collections: matplotlib leaves 6 MB a slide in cycles, of so few objects that Python would
#: collect after hundreds of slides only. A collection takes 9 ms.
_COLLECT = 8
_performed = itertools.count(1)


@dataclass(frozen=True)
class Ready:
    """A job whose models are loaded."""

    #: Processes a slide, given its folder and a progress callback, or resumes it.
    work: Callable[[SlideRef, Path, Progress], object]
    #: Estimates before a slide is processed: "bytes" of its results and, for some jobs, its priority by "triage".
    answers: Mapping[str, Callable[[SlideRef], float]]
    #: What decides the results: a results folder is bound to it.
    configuration: dict[str, Any]
    #: What does not decide them.
    execution: dict[str, Any]


@dataclass(frozen=True)
class ScoreJob:
    """``score_slide`` for each slide. `status` and `columns` are for slides.csv, see ``Tables``."""

    engine: EngineConfig
    config: ScoreConfig
    status: ClassVar[str] = "scored"
    columns: ClassVar[tuple[str, ...]] = (
        "grade", "probabilities", "n_tiles", "n_unreadable", "tissue_mm2", "positive_mm2", "positive_alone_mm2",
        "largest_region_um", "mpp", "mpp_source", "flags",
    )  # fmt: skip

    def finished(self, own: Path) -> SlideResult | None:
        """Return the result in a slide's folder, or None if something is still to do."""
        result = read_result(own)
        explained = not self.config.explain or (own / EXPLAINED).is_file()
        return result if explained or result is None or not result.numbers["n_tiles"] else None

    def load(self) -> Ready:
        """Load the models; raises what ``EngineConfig.load``, ``ScoreConfig.check`` and ``check_maps`` raise."""
        from wsi.nn.gradcam import check_maps
        from wsi.run import estimate_bytes, explain_slide, score_slide, triage  # torch, which ``TileJob`` does not need

        engine, config = self.engine.load(), self.config
        config.check(engine.model.config)
        if config.explain:
            check_maps(engine.model)
        numbers = asdict(config)
        unbound = {name: numbers.pop(name) for name in ("max_unreadable", "explain")}  # these decide no number
        del numbers["context"]  # added below if the model has one
        configs = [model.config for model in (engine.model, engine.mil) if model is not None]
        models = [asdict(replace(config_of, folder=Path())) for config_of in configs]
        numbers["model_config"] = hashlib.sha256(json.dumps(models, default=str).encode()).hexdigest()[:12]
        if config.stain is not None and config.stain_target not in TARGETS:
            numbers["stain_target_sha256"] = sha256_of(config.stain_target)
        if engine.stain_range is not None:
            numbers["stain_range"] = engine.stain_range.sha256[:12]
        if engine.model.config.context is not None:
            numbers["context"] = asdict(engine.model.config.context) if config.context else None

        def work(ref: SlideRef, own: Path, progress: Progress) -> None:
            if read_result(own) is not None:  # only explained.png is missing
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
    """``tile_slide`` for each slide."""

    config: TileConfig
    threads: int
    status: ClassVar[str] = "tiled"
    columns: ClassVar[tuple[str, ...]] = (
        "n_tiles", "n_unreadable", "tile_px", "tile_mpp", "pixels", "tissue_mm2", "mpp", "mpp_source", "flags",
    )  # fmt: skip

    def finished(self, own: Path) -> SlideResult | None:
        """Return the result in a slide's folder, or None."""
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
    """Return a job's description, from which ``from_json`` makes it again."""
    return {"job": type(job).__name__, **asdict(job)}


def from_json(described: dict[str, Any]) -> Job:
    """Make a job from its description."""
    config = {**described["config"], "tissue": TissueConfig(**described["config"]["tissue"])}
    if described["job"] == "TileJob":
        return TileJob(TileConfig(**config), described["threads"])
    config["positive"] = tuple(config["positive"])
    return ScoreJob(EngineConfig(**described["engine"]), ScoreConfig(**config))


@dataclass(frozen=True)
class Task:
    """One slide to process, or a question about it."""

    slide_id: str
    ref: SlideRef
    own: str  # the slide's folder
    claim: Claim | None = None  # needed to process it
    question: str = ""  # one of ``Ready.answers``; empty: process the slide

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> Self:
        """Undo ``dataclasses.asdict``."""
        ref, claim = SlideRef(**described["ref"]), described["claim"]
        return cls(**{**described, "ref": ref, "claim": Claim(**claim) if claim else None})


def is_of(result: SlideResult, ref: SlideRef) -> bool:
    """Whether a result is of this slide and, by its fingerprint, of its present file."""
    if result.numbers.get("slide") != absolute(ref.path):
        return False
    prints = result.numbers.get("file_fingerprint"), fingerprint(ref.path)
    return None in prints or prints[0] == prints[1]


def perform(ready: Ready, task: Task, progress: Progress) -> dict[str, Any]:
    """Process one slide, or answer a question about it; this is the only place where a slide may fail.

    Returned are arguments of ``Event``: `kind` "done", with an answer as `value`; or "failed", with a row of
    failures.csv as `record`. Raises ClaimLost if another process has taken the slide over, and OutputError if the
    results folder cannot be written to, so that the run must end.
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
            what = "is of another file than lies there now under the slide's name"
            raise ConfigMismatch(own, what, "Delete that folder, or run this slide alone with --force")
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
    """Return an exception as a row of failures.csv; print the traceback of an unexpected one."""
    if isinstance(error, WsiError):
        return failure_row(task, stage, f"{error.where}: {error.what}", error.remedy)
    if isinstance(error, UnicodeEncodeError):
        return failure_row(task, stage, f"{task.ref.path}: its path is not UTF-8 text", "Rename it")
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or "out of memory" in what.lower():
        return failure_row(task, stage, what, "Lower --batch-size or --threads, or use a machine with more memory")
    if isinstance(error, OSError):
        return failure_row(task, stage, what, "The file system failed: try again, or copy the slide nearer")
    traceback.print_exception(error, file=sys.stderr)  # a bug of ours or of a library
    return failure_row(task, stage, what, "Please report this: it should not happen")


def failure_row(task: Task, stage: str, error: str, remedy: str) -> Row:
    """Return a row of failures.csv."""
    place = {"slide_id": task.slide_id, "slide": absolute(task.ref.path)}
    return {**place, "stage": stage, "error": error, "remedy": remedy}
