"""Slides on a Dask cluster: the same tasks, in processes on machines that share the folders."""

from __future__ import annotations

import json
import logging
import queue
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from wsi.archive.claims import Claim, ClaimLost
from wsi.archive.jobs import Job, Ready, Task, failure_row, from_json, perform, to_json
from wsi.archive.workers import Event, Tell
from wsi.errors import WsiError
from wsi.slide import absolute

_loaded: dict[str, Ready] = {}
_lock = threading.Lock()  # one slide at a time per process, however many threads it has


def _prepare(job: str) -> tuple[dict[str, Any], dict[str, Any]]:
    with _lock:
        if job not in _loaded:
            _loaded.clear()
            _loaded[job] = from_json(json.loads(job)).load()
        return _loaded[job].configuration, _loaded[job].execution


def _do(job: str, task: dict[str, Any]) -> dict[str, Any]:
    """Do one slide in a worker of the cluster. Dask may run it twice: a finished slide is not done again."""
    _prepare(job)
    with _lock:
        try:
            return perform(_loaded[job], Task.from_json(task), lambda stage, done, total: None)
        except ClaimLost:
            return {"kind": "lost"}


class Cluster:
    """Workers of a Dask cluster, see ``wsi.archive.workers.Executor``.

    `address` is the scheduler's, or "local" for a temporary cluster of `workers` (default 1) on this machine.
    """

    def __init__(self, job: Job, address: str, workers: int | None) -> None:
        self._job, self._address, self._n = json.dumps(to_json(job), sort_keys=True), address, workers
        self._running: dict[Any, Task] = {}
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._client: Any = None
        self._cluster: Any = None

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            import dask
            import distributed
        except ImportError as error:
            what, remedy = "needs Dask distributed, which is not here", "Install it with: pip install 'wsi[cluster]'"
            raise WsiError(f"scheduler={self._address!r}", what, remedy) from error
        if self._address == "local":
            # A slide that has crashed two workers would crash a third.
            with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
                self._cluster = distributed.LocalCluster(
                    n_workers=self._n or 1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None,
                    silence_logs=logging.CRITICAL,
                )  # fmt: skip
        try:
            self._client = distributed.Client(self._cluster or self._address, timeout="30s", set_as_default=False)
        except (OSError, ValueError) as error:
            remedy = "Start it with: dask scheduler; then dask worker on each machine"
            raise WsiError(f"scheduler={self._address!r}", f"cannot be reached ({error})", remedy) from error
        prepared: tuple[dict[str, Any], dict[str, Any]] = self._client.submit(_prepare, self._job, pure=False).result()
        configuration, execution = prepared
        return configuration, {**execution, "scheduler": self._address}

    def free(self) -> bool:
        """See ``Executor``. No slide may queue at a worker: if that worker dies, Dask blames the queued slides too."""
        return len(self._running) < len(self._client.ncores())

    def give(self, task: Task) -> None:
        ref, own = task.ref, str(Path(task.own).absolute())  # workers have working directories of their own
        ref = replace(ref, path=absolute(ref.path), mask=absolute(ref.mask) if ref.mask else None)
        claim = task.claim and Claim(str(Path(task.claim.path).absolute()), task.claim.nonce)
        there = replace(task, ref=ref, own=own, claim=claim)
        future = self._client.submit(_do, self._job, asdict(there), pure=False)
        self._running[future] = task
        future.add_done_callback(self._ended.put)

    def wait(self, tell: Tell) -> None:
        try:
            future = self._ended.get(timeout=0.25)
        except queue.Empty:
            return
        task = self._running.pop(future)
        if future.status == "finished":
            tell(Event(slide_id=task.slide_id, **future.result()))
            return
        if future.status == "lost":  # done, but its worker was crashed by the next slide
            tell(Event("lost", task.slide_id))
            return
        error = future.exception() if future.status == "error" else None
        if error is None:
            what = f"lost the task of {task.slide_id} ({future.status})"
            raise WsiError(self._address, what, "Run the command again")
        if type(error).__name__ != "KilledWorker":
            raise error
        remedy = "A library crashed on this slide, or it needs more memory than a worker has: try another --reader"
        record = failure_row(task, "open", f"ended worker after worker: {error}", remedy)
        tell(Event("failed", task.slide_id, record=record))

    def stop(self) -> None:
        client, cluster, self._client, self._cluster = self._client, self._cluster, None, None
        if client is not None:
            client.cancel(list(self._running))
            client.close()
        if cluster is not None:
            cluster.close()
