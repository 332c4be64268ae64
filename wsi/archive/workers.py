"""Who does the slides: this process, or processes of its own, which a slide may kill without ending the run."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from wsi import errors
from wsi.archive.claims import ClaimLost
from wsi.archive.folder import Row
from wsi.archive.jobs import END_S, Job, Task, failure_row, perform, to_json
from wsi.errors import WsiError

#: Seconds between two looks at what workers use and how long they take.
_LOOK_S = 0.25
#: Workers in a row that end before they begin a slide: then it is not the slides.
_IDLE_DEATHS = 3


@dataclass(frozen=True)
class Event:
    """What happened in a run.

    Attributes
    ----------
    kind : str
        "begin" (a slide), "stage" (it went on), "done", "failed", or "lost" (another run has taken it over, or
        its worker ended before it began).
    slide_id : str
    stage : str
    done, total : int
        How much of the stage, for "stage".
    record : dict, optional
        The row of slides.csv or failures.csv, for "done" and "failed".
    value : float, optional
        The answer, where something was asked.
    """

    kind: str
    slide_id: str
    stage: str = ""
    done: int = 0
    total: int = 0
    record: Row | None = None
    value: float | None = None


#: A callback for events.
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Limits:
    """What a slide may take; one that takes more fails, and the others go on.

    Attributes
    ----------
    seconds : float, optional
        Wall time.
    memory_bytes : int, optional
        Resident memory of the process that does it, the models included.
    """

    seconds: float | None = None
    memory_bytes: int | None = None


class Executor(Protocol):
    """Something that processes slides: this process, worker processes, or a cluster."""

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the models; return `configuration` and `execution` as ``jobs.Ready`` has them."""

    def free(self) -> bool:
        """Whether another task can be given."""

    def give(self, task: Task) -> None:
        """Hand out a slide."""

    def wait(self, tell: Tell) -> None:
        """Tell what has happened; wait a little where nothing has."""

    def stop(self) -> None:
        """End, whatever is being done."""


class InProcess:
    """Processes slides one at a time in the calling process. A native crash ends the run, and there are no limits."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._task: Task | None = None

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self._ready = self._job.load()
        return self._ready.configuration, self._ready.execution

    def free(self) -> bool:
        return self._task is None

    def give(self, task: Task) -> None:
        self._task = task

    def wait(self, tell: Tell) -> None:
        """See ``Executor``; this is where the slide is done."""
        task, self._task = self._task, None
        if task is None:
            time.sleep(_LOOK_S)  # for slides that another run has claimed
            return
        slide_id = task.slide_id
        try:
            said = perform(self._ready, task, lambda *what: tell(Event("stage", slide_id, *what)))
        except ClaimLost:
            said = {"kind": "lost"}
        tell(Event(slide_id=slide_id, **said))

    def stop(self) -> None:
        """See ``Executor``."""


class Workers:
    """Worker processes on this machine: a crash in one of them does not affect the others.

    Parameters
    ----------
    n : int, optional
        How many; None for one a GPU, or one where there is none.
    """

    def __init__(self, job: Job, n: int | None, limits: Limits) -> None:
        self._job, self._n, self._limits = job, n, limits
        self._said: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._first: dict[str, Any] = {}  # what the first worker told when it was ready
        self._idle_deaths = 0

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """See ``Executor``. The first tells how many GPUs there are; the others load while it works."""
        first = self._begin(0)
        _, said = self._said.get()
        if said["kind"] == "died":
            raise WsiError("the worker process", f"ended while the models were loaded ({said['how']})", "See above")
        if said["kind"] == "refused":
            raise _error(said["error"])
        first.is_ready, self._first = True, said
        first.check_idle(self._limits)
        for number in range(1, self._n or max(1, said["devices"])):
            self._begin(number)
        return said["configuration"], said["execution"]

    def free(self) -> bool:
        return any(worker.is_free for worker in self._workers)

    def give(self, task: Task) -> None:
        next(worker for worker in self._workers if worker.is_free).give(task)

    def wait(self, tell: Tell) -> None:
        until, kind = time.monotonic() + _LOOK_S, "stage"
        with suppress(queue.Empty):
            while kind == "stage" and (left := until - time.monotonic()) > 0:
                worker, said = self._said.get(timeout=left)
                kind = said["kind"]
                self._hear(worker, said, tell)
        for worker in self._workers:
            worker.check(self._limits)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.wait()

    def _begin(self, number: int) -> _Worker:
        devices = self._first.get("devices", 0)
        worker = _Worker(self._job, self._said, number, _environment(number, self._n or max(1, devices), devices))
        self._workers.append(worker)
        return worker

    def _hear(self, worker: _Worker, said: dict[str, Any], tell: Tell) -> None:
        kind, task = said["kind"], worker.task
        if kind == "ready":
            for name in ("configuration", "execution"):
                if said[name] != self._first[name]:  # results would depend on who does a slide
                    what = f"has another {name} than the first: {said[name]}, not {self._first[name]}"
                    raise WsiError("a worker process", what, "Name --device and --precision, or use fewer --workers")
            worker.is_ready = True
        elif kind == "refused":  # nothing can be written, or the models are gone
            raise _error(said["error"])
        elif kind == "stage":
            worker.stage, self._idle_deaths = said["stage"], 0
            tell(Event("stage", task.slide_id if task else "", said["stage"], said["done"], said["total"]))
        elif kind == "died":
            self._workers.remove(worker)
            worker.stop()
            failure = worker.failure(said["how"])
            self._idle_deaths += failure is None
            if self._idle_deaths >= _IDLE_DEATHS:
                raise WsiError("worker processes", f"end before they begin a slide ({said['how']})", "See above")
            self._begin(worker.number)
            if task is not None:
                tell(Event("failed" if failure else "lost", task.slide_id, record=failure))
        elif task is not None:  # done, failed, lost
            worker.task = None
            tell(Event(slide_id=task.slide_id, **said))


class _Worker:
    """One process, and what it is doing."""

    def __init__(
        self,
        job: Job,
        said: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]],
        number: int,
        environment: dict[str, str],
    ) -> None:
        self.number, self.is_ready, self.stage = number, False, ""
        self.task: Task | None = None
        self._began = 0.0
        self._reason: tuple[str, str] | None = None
        command, pipe = [sys.executable, "-m", "wsi.archive.worker"], subprocess.PIPE
        # Ctrl-C reaches the whole group: the worker inherits a mask that keeps it from the first moment on.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        self._send(to_json(job))
        self._listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._listener.start()

    @property
    def is_free(self) -> bool:
        """Whether it can be given a slide: not where it was killed just after it had ended one."""
        return self.is_ready and self.task is None and self._reason is None

    def give(self, task: Task) -> None:
        """Hand it a slide."""
        self.task, self.stage, self._began = task, "", time.monotonic()
        self._send(asdict(task))

    def check(self, limits: Limits) -> None:
        """Kill it where it takes more than it may."""
        if self.task is None or self._reason:
            return
        spent = time.monotonic() - self._began
        if limits.seconds is not None and spent > limits.seconds:
            remedy = "Look whether the slide is damaged, or allow more with --slide-timeout"
            self._kill(f"took more than {limits.seconds:g} s", remedy)
        used = _resident_bytes(self._process.pid) if limits.memory_bytes is not None else 0
        if limits.memory_bytes is not None and used > limits.memory_bytes:
            what = f"took {used / 2**30:.2f} GiB of memory, {limits.memory_bytes / 2**30:.2f} are allowed"
            self._kill(what, "Lower --batch-size or --threads, or allow more with --max-memory")

    def check_idle(self, limits: Limits) -> None:
        """Refuse a limit that cannot be kept, or that no slide could keep."""
        if limits.memory_bytes is None:
            return
        used, where = _resident_bytes(self._process.pid), f"max_memory={limits.memory_bytes / 2**30:.2f} GiB"
        if not used:
            raise WsiError(where, "this system does not tell what a process uses (no /proc)", "Leave --max-memory out")
        if used > limits.memory_bytes:
            what = f"a worker takes {used / 2**30:.2f} GiB before its first slide"
            raise WsiError(where, what, "Allow more with --max-memory")

    def failure(self, how: str) -> Row | None:
        """Say why it ended before its slide did; None where the slide is not to blame, as it had not begun."""
        if self.task is None or not (self.stage or self._reason):
            return None
        crash = "A library crashed on this slide: try another --reader, or convert the slide"
        killed = "Something killed it, perhaps for want of memory: try --max-memory, or a smaller --batch-size"
        what, remedy = self._reason or (f"ended the worker process ({how})", killed if "KILL" in how else crash)
        return failure_row(self.task, self.stage or "open", f"{self.task.ref.path}: {what}", remedy)

    def stop(self) -> None:
        """Ask it to end: its stdin does."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has, which it does by itself."""
        try:
            self._process.wait(timeout=2 * END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()

    def _kill(self, what: str, remedy: str) -> None:
        self._reason = what, remedy
        self._process.kill()

    def _send(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which we are about to hear
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _listen(self, said: queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # cut short by its death
                    said.put((self, json.loads(line)))
        code = self._process.wait()
        said.put((self, {"kind": "died", "how": _how(code)}))


def _how(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _environment(number: int, of: int, devices: int) -> dict[str, str]:
    """Give each worker its own GPU of those that the first one sees, and its share of the cores."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # spinning threads starve each other on a busy machine
    if devices:
        names = (environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = names[number % devices]
    if of > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // of)))
    return environment


def _resident_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where the machine does not tell (no /proc) or it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _error(said: list[str]) -> WsiError:
    """Make an error again that a worker told of."""
    name, where, what, remedy = said
    found: type[WsiError] = getattr(errors, name)
    return found(where, what, remedy)


def default_threads() -> int:
    """Reader threads: what the machine has, since decoding releases the interpreter lock."""
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
