"""The main loop of a run: bind the folder, then claim each slide, hand it to the executor, and record the outcome."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from wsi.archive.cache import Cache
from wsi.archive.claims import Claim, Claims
from wsi.archive.folder import (
    CLAIMS,
    TABLES_CLAIM,
    Row,
    Tables,
    bind,
    look_again,
    owner_of,
    read_failure,
    slide_ids,
    sweep,
    sweep_tables,
    write_failure,
)
from wsi.archive.jobs import Job, Task, is_of
from wsi.archive.slides import SlideRef
from wsi.archive.workers import Event, Executor, Tell
from wsi.errors import OutputError, WsiError
from wsi.slide import absolute, file_bytes

#: Ways to order slides.
ORDERS = ("given", "size", "triage")
#: Slides from which the disk space needed for results is estimated.
_SAMPLE = 8
#: With free space of so many times the slides' own size, no estimate is made.
_PLENTY = 20
#: Slides that the cache copies ahead.
_AHEAD = 2
#: How often workers may fail to see a claim (network file systems may be slow) before the run ends.
_UNSEEN = 10


@dataclass
class Summary:
    """The outcome of a run's slides: rows of slides.csv and of failures.csv, in the order given."""

    done: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)


def run(
    refs: Sequence[SlideRef], folder: Path, job: Job, executor: Executor, *, order: str = "given",
    cache: Cache | None = None, force: bool = False, command: Sequence[str] = (), tell: Tell = lambda event: None,
) -> Summary:  # fmt: skip
    """Do `job` for all slides with `executor`; other runs may be working on the same results folder."""
    if order not in ORDERS:
        raise WsiError(f"order={order!r}", "no such order", f"Known: {', '.join(ORDERS)}")
    try:
        configuration, execution = executor.start()
        folder.mkdir(parents=True, exist_ok=True)
        ids = slide_ids(refs, folder)
        named = dict(zip(ids, refs, strict=True))
        tables = Tables(folder, job.columns, job.status, named)
        with Claims(folder / CLAIMS) as claims, cache or nullcontext():
            with claims.holding(TABLES_CLAIM):
                sweep_tables(folder)
                bind(folder, refs, ids, configuration=configuration, execution=execution, command=command, force=force)
            try:
                work = _Run(folder, named, job, executor, claims, tables, cache, tell)
                work.sort(order)
                work.check_disk()
                rows = work.run()
            finally:
                executor.stop()  # before the claims are released
                overtaken = True
                while overtaken:  # another run may have written newer tables if we were suspended
                    with claims.holding(TABLES_CLAIM) as claim:
                        sweep_tables(folder)
                        tables.write(last=True)
                        overtaken = not claim.holds()
    except OSError as error:
        if isinstance(error, WsiError):
            raise
        raise OutputError.of(error, folder) from error
    finally:
        executor.stop()
    summary = Summary()
    for slide_id in named:
        kind, row = rows[slide_id]
        (summary.done if kind == "done" else summary.failed).append(row)
    return summary


@dataclass(eq=False)
class _Run:
    """The state of one run: the slides that wait, those in work, and the outcome of the others, by slide id."""

    _folder: Path
    _refs: dict[str, SlideRef]
    _job: Job
    _executor: Executor
    _claims: Claims
    _tables: Tables
    _cache: Cache | None
    _tell: Tell
    _to_do: deque[str] = field(default_factory=deque)
    _coming: dict[str, Future[str | None]] = field(default_factory=dict)  # claimed, and being copied
    _doing: dict[str, Claim] = field(default_factory=dict)
    _rows: dict[str, tuple[str, Row]] = field(default_factory=dict)
    _unseen: int = 0

    def __post_init__(self) -> None:
        self._to_do.extend(self._refs)

    def sort(self, order: str) -> None:
        """Put the slides in order; those that cannot be judged come last."""
        if order == "size":
            sizes = {name: file_bytes(ref.path) or 0 for name, ref in self._refs.items()}
            self._to_do = deque(sorted(self._to_do, key=lambda name: -sizes[name]))
        elif order == "triage":
            found = self._ask("triage", [name for name in self._to_do if not self._is_finished(name)])
            self._to_do = deque(sorted(found, key=lambda name: -(found[name] or 0.0)))

    def check_disk(self) -> None:
        """Raise OutputError if the disk cannot hold the results, as estimated from a few slides."""
        missing = [name for name in self._to_do if not self._is_finished(name)]
        self._to_do = deque(missing)
        free = shutil.disk_usage(self._folder).free
        sizes = [file_bytes(self._refs[name].path) or 0 for name in missing]
        if all(sizes) and free > _PLENTY * sum(sizes):
            return
        sample = missing[:: -(-len(missing) // _SAMPLE) or 1]
        answers = [value for value in self._ask("bytes", sample).values() if value is not None]
        needed = sum(answers) / len(answers) * len(missing) if answers else 0.0
        if needed > free:
            what = f"has {free / 1e9:.3g} GB free, and {len(missing)} slides need about {needed / 1e9:.3g} GB"
            raise OutputError(self._folder, what, "Make room, choose another folder with -o, or keep less (--pixels)")

    def _ask(self, question: str, names: Sequence[str]) -> dict[str, float | None]:
        """Return the executor's answer for each slide (see ``Ready.answers``), or None where that fails."""
        waiting, found = deque(names), dict.fromkeys(names, None)
        failed: Row | None = None

        def on_answer(event: Event) -> None:
            nonlocal failed
            if event.kind != "stage":
                found[event.slide_id] = event.value
                failed = event.record or failed
                asked.remove(event.slide_id)

        asked: set[str] = set()
        while waiting or asked:
            while waiting and self._executor.free():
                name = waiting.popleft()
                asked.add(name)
                self._executor.give(Task(name, self._refs[name], str(self._folder / name), question=question))
            self._executor.wait(on_answer)
        if failed is not None and all(value is None for value in found.values()) and question == "triage":
            raise WsiError(failed["slide"], f"no slide can be judged beforehand: {failed['error']}", failed["remedy"])
        return found

    def run(self) -> dict[str, tuple[str, Row]]:
        """Process until every slide is done or failed, here or in another run; return their rows."""
        while self._to_do or self._doing:
            self._give()
            for _ in range(len(self._to_do)):
                if not self._may_claim(self._to_do[0]):
                    break
                self._claim(self._to_do.popleft())
                self._give()
            self._write_tables()  # while the executor is at work
            if self._to_do or self._doing:
                self._executor.wait(self._on_event)
        return self._rows

    def _write_tables(self) -> None:
        """Write the tables if that is due and no other run is writing them."""
        if self._tables.is_due() and (claim := self._claims.take(TABLES_CLAIM)) is not None:
            try:
                self._tables.write()
            finally:
                self._claims.release(claim)

    def _may_claim(self, slide_id: str) -> bool:
        """Whether a slide can be handed out at once or, with a cache, be copied meanwhile."""
        if self._cache is None:
            return self._executor.free()
        return len(self._coming) < _AHEAD and self._cache.has_room(self._refs[slide_id].path)

    def _claim(self, slide_id: str) -> None:
        """Claim a slide; or note its outcome if it has ended, or try later if another run has claimed it."""
        if self._is_finished(slide_id):
            return
        claim = self._claims.take(slide_id)
        if claim is None:
            self._to_do.append(slide_id)
            return
        look_again(self._folder / slide_id)
        if self._is_finished(slide_id):  # it has ended before we claimed it
            self._claims.release(claim)
        elif owner_of(self._folder / slide_id) not in (None, absolute(self._refs[slide_id].path)):
            self._claims.release(claim)
            self._rename(slide_id)
        else:
            sweep(self._folder / slide_id)
            self._doing[slide_id] = claim
            near: Future[str | None] = Future()
            near.set_result(None)
            self._coming[slide_id] = self._cache.fetch(self._refs[slide_id].path) if self._cache else near

    def _rename(self, slide_id: str) -> None:
        """Give a slide a new name: since this run began, another run has given its name to another slide."""
        (name,) = slide_ids([self._refs[slide_id]], self._folder)
        named = [(name if known == slide_id else known, ref) for known, ref in self._refs.items()]
        self._refs.clear()
        self._refs.update(named)  # in the same order
        self._to_do.append(name)

    def _give(self) -> None:
        """Hand out the slides that are claimed and, with a cache, copied."""
        for slide_id, copy in list(self._coming.items()):
            if copy.done() and self._executor.free():
                del self._coming[slide_id]
                self._tell(Event("begin", slide_id))
                ref = replace(self._refs[slide_id], local=copy.result())
                self._executor.give(Task(slide_id, ref, str(self._folder / slide_id), self._doing[slide_id]))

    def _is_finished(self, slide_id: str) -> bool:
        """Whether a slide has a result, or another run has failed on it since this one began; note its row."""
        own, ref = self._folder / slide_id, self._refs[slide_id]
        if (result := self._job.finished(own)) is not None and is_of(result, ref):
            self._note("done", slide_id, self._tables.row(result))
        elif (failure := read_failure(own, since=self._claims.began)) and failure.get("slide") == absolute(ref.path):
            self._note("failed", slide_id, failure)
        return slide_id in self._rows

    def _on_event(self, event: Event) -> None:
        """Record what the executor reports."""
        slide_id = event.slide_id
        if event.kind == "stage":
            self._tell(event)
            return
        claim = self._doing.pop(slide_id)
        if self._cache is not None:
            self._cache.drop(self._refs[slide_id].path)
        lost = event.kind == "lost" or not claim.holds()
        if event.kind == "lost" and claim.holds():  # the worker does not see our claim
            self._unseen += 1
            if self._unseen > _UNSEEN:
                what = "is not seen by a worker as it is seen here: claims made in it are not there"
                raise OutputError(self._folder, what, "Mount it under the same path on all machines")
        if event.record is not None and not lost:
            write_failure(self._folder / slide_id, event.record)
        if not lost:  # the worker may be on another machine
            look_again(self._folder / slide_id)
        finished = self._is_finished(slide_id)
        self._claims.release(claim)
        if not finished and (lost or self._job.finished(self._folder / slide_id) is not None):  # its file has changed
            self._to_do.append(slide_id)
            self._tell(Event("lost", slide_id))
        elif not finished:
            what = "was done, and its result cannot be read back"
            raise OutputError(self._folder / slide_id, what, "Look at the disk, and run the same command again")

    def _note(self, kind: str, slide_id: str, row: Row) -> None:
        self._rows[slide_id] = kind, row
        self._tell(Event(kind, slide_id, record=row))
