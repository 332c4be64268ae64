"""Many slides into one results folder: a broken slide becomes a row of failures.csv and does not end the run.

``walk.run`` is the main loop. `folder` is the results folder, `claims` how several runs share it, `jobs` what is done
to a slide, `workers` and `cluster` the processes that do it, and `cache` the local copies of slides on slow storage.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from wsi.archive.cache import Cache
from wsi.archive.jobs import Job, ScoreJob, TileJob
from wsi.archive.slides import SlideRef, find_slides
from wsi.archive.walk import Summary, run
from wsi.archive.workers import Event, Executor, InProcess, Limits, Tell, Workers, default_threads
from wsi.engine import EngineConfig, ScoreConfig
from wsi.errors import WsiError
from wsi.tile import TileConfig

__all__ = [
    "Cache", "Event", "Limits", "SlideRef", "Summary", "default_threads", "find_slides",
    "score_archive", "tile_archive",
]  # fmt: skip


def score_archive(
    refs: Sequence[SlideRef],
    folder: str | os.PathLike[str],
    engine: EngineConfig,
    config: ScoreConfig | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
    order: str = "given",
    cache: Cache | None = None,
    force: bool = False,
    command: Sequence[str] = (),
    tell: Tell = lambda event: None,
) -> Summary:
    """Score slides. A repeated call does only what is missing; several at the same time share the work.

    Parameters
    ----------
    refs : sequence of SlideRef
    folder : path
        The results folder; created if needed.
    engine : EngineConfig
    config : ScoreConfig, optional
    workers : int, optional
        Worker processes on this machine; default: one per GPU, or one. 0: this process, without `limits`; a crash in a
        library then ends it.
    scheduler : str, optional
        Use Dask instead (extra ``cluster``): an address such as "tcp://host:8786", or "local" for a cluster of
        `workers` on this machine.
    limits : Limits
        Time and memory that one slide may take; ignored with `workers` 0 or `scheduler`.
    order : {"given", "size", "triage"}
        As given; largest first, so that no long slide is left for the end; or (scoring only) likely positive slides
        first, see ``wsi.run.triage``.
    cache : Cache, optional
        Copies slides from slow storage to this machine first. Not with a scheduler other than "local", whose workers
        could not read the copies.
    force : bool
        Delete earlier results of these slides; those of other slides stay.
    command : sequence of str
        Recorded in run.json.
    tell : callable
        Called with every ``Event``.

    Returns
    -------
    Summary
        The outcome of these slides, including those that other runs processed.

    Raises
    ------
    ConfigMismatch
        The folder holds results of another configuration; the difference is named, and nothing is changed.
    OutputError
        The folder cannot be written to (full, read-only); the run ends.
    ModelError
        The models cannot be loaded.

    Examples
    --------
    >>> from wsi import EngineConfig, find_slides, score_archive
    >>> summary = score_archive(find_slides(["archive/"]), "results", EngineConfig("idc-breast"))     # doctest: +SKIP
    >>> [row["slide"] for row in summary.failed]                                                    # doctest: +SKIP
    []
    """
    job = ScoreJob(engine, config or ScoreConfig())
    executor = _executor(job, workers, scheduler, limits, cache)
    return run(refs, Path(folder), job, executor, order=order, cache=cache, force=force, command=command, tell=tell)


def tile_archive(
    refs: Sequence[SlideRef],
    folder: str | os.PathLike[str],
    config: TileConfig | None = None,
    *,
    threads: int | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    limits: Limits = Limits(),  # noqa: B008
    order: str = "given",
    cache: Cache | None = None,
    force: bool = False,
    command: Sequence[str] = (),
    tell: Tell = lambda event: None,
) -> Summary:
    """Cut slides into patch stores, ``<folder>/<slide_id>/store.zarr``. A repeated call does only what is missing.

    Parameters and errors are those of ``score_archive``, and `config` and `threads` those of ``tile_slide``.
    """
    if order == "triage":
        raise WsiError("order='triage'", "needs a model, and patches are cut without one", "Use given or size")
    job = TileJob(config or TileConfig(), threads or default_threads())
    executor = _executor(job, workers, scheduler, limits, cache)
    return run(refs, Path(folder), job, executor, order=order, cache=cache, force=force, command=command, tell=tell)


def _executor(job: Job, workers: int | None, scheduler: str | None, limits: Limits, cache: Cache | None) -> Executor:
    if workers is not None and workers < 0:
        raise WsiError(f"workers={workers}", "cannot be fewer than none", "0 is this process itself")
    if cache is not None and scheduler not in (None, "local"):
        what = "copies slides to a disk of this machine, which workers on others do not see"
        remedy = "Leave it out; or leave --scheduler out and run the same command on every machine (docs/cluster.md)"
        raise WsiError("--cache-dir", what, remedy)
    if scheduler is not None:
        from wsi.archive.cluster import Cluster

        return Cluster(job, scheduler, workers)
    return InProcess(job) if workers == 0 else Workers(job, workers, limits)
