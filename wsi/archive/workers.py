"""Executors: process slides in this process, or in worker processes that may crash without ending the run."""

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

#: Seconds between two checks of the workers' limits.
_LOOK_S = 0.25
#: The run ends when so many workers in a row die before they begin a slide.
_IDLE_DEATHS = 3


@dataclass(frozen=True)
class Event:
    """Something that happened to a slide.

    `kind` is "begin"; "stage": it has made progress; "done"; "failed"; or "lost": another run has taken it over, or its
    worker died before it began.
    """

    kind: str
    slide_id: str
    stage: str = ""
    done: int = 0  # of `total`, within the stage
    total: int = 0
    record: Row | None = None  # its row of slides.csv or failures.csv, for "done" and "failed"
    value: float | None = None  # the answer to a question (see ``Task``)


#: A callback for events.
Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Limits:
    """What one slide may take; one that takes more fails, and the run continues."""

    seconds: float | None = None  # wall time
    memory_bytes: int | None = None  # resident memory of the worker process, including the models


class Executor(Protocol):
    """Something that processes slides: this process, worker processes, or a cluster."""

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the models; return `configuration` and `execution` of ``jobs.Ready``."""

    def free(self) -> bool:
        """Whether it can take another task."""

    def give(self, task: Task) -> None:
        """Take a task."""

    def wait(self, tell: Tell) -> None:
        """Report events; wait briefly if there are none."""

    def stop(self) -> None:
        """Stop at once, whatever is in progress."""


class InProcess:
    """Processes slides one at a time in this process: a native crash ends the run, and there are no limits."""

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
        """See ``Executor``; this processes the slide."""
        task, self._task = self._task, None
        if task is None:
            time.sleep(_LOOK_S)  # the remaining slides are claimed by other runs
            return
        slide_id = task.slide_id
        try:
            outcome = perform(self._ready, task, lambda *progress: tell(Event("stage", slide_id, *progress)))
        except ClaimLost:
            outcome = {"kind": "lost"}
        tell(Event(slide_id=slide_id, **outcome))

    def stop(self) -> None:
        """See ``Executor``."""


class Workers:
    """`n` worker processes on this machine (None: one per GPU, or one); a crash of one does not affect the others."""

    def __init__(self, job: Job, n: int | None, limits: Limits) -> None:
        self._job, self._n, self._limits = job, n, limits
        self._messages: _Messages = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._first: dict[str, Any] = {}  # the message by which the first worker said that it is ready
        self._idle_deaths = 0

    def start(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """See ``Executor``. The first worker reports the number of GPUs; the others load while it works."""
        first = self._begin(0)
        _, message = self._messages.get()
        if message["kind"] == "died":
            raise WsiError("the worker process", f"ended while the models were loaded ({message['how']})", "See above")
        if message["kind"] == "refused":
            raise _error(message["error"])
        first.is_ready, self._first = True, message
        first.check_idle(self._limits)
        for number in range(1, self._n or max(1, message["devices"])):
            self._begin(number)
        return message["configuration"], message["execution"]

    def free(self) -> bool:
        return any(worker.is_free for worker in self._workers)

    def give(self, task: Task) -> None:
        next(worker for worker in self._workers if worker.is_free).give(task)

    def wait(self, tell: Tell) -> None:
        until, kind = time.monotonic() + _LOOK_S, "stage"
        with suppress(queue.Empty):
            while kind == "stage" and (left := until - time.monotonic()) > 0:
                worker, message = self._messages.get(timeout=left)
                kind = message["kind"]
                self._receive(worker, message, tell)
        for worker in self._workers:
            worker.check(self._limits)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.wait()

    def _begin(self, number: int) -> _Worker:
        devices = self._first.get("devices", 0)
        worker = _Worker(self._job, self._messages, number, _environment(number, self._n or max(1, devices), devices))
        self._workers.append(worker)
        return worker

    def _receive(self, worker: _Worker, message: dict[str, Any], tell: Tell) -> None:
        kind, task = message["kind"], worker.task
        if kind == "ready":
            for name in ("configuration", "execution"):
                if message[name] != self._first[name]:  # results would depend on the worker
                    what = f"has another {name} than the first: {message[name]}, not {self._first[name]}"
                    raise WsiError("a worker process", what, "Name --device and --precision, or use fewer --workers")
            worker.is_ready = True
        elif kind == "refused":  # nothing can be written, or the models are gone
            raise _error(message["error"])
        elif kind == "stage":
            worker.stage, self._idle_deaths = message["stage"], 0
            tell(Event("stage", task.slide_id if task else "", message["stage"], message["done"], message["total"]))
        elif kind == "died":
            self._workers.remove(worker)
            worker.stop()
            failure = worker.failure(message["how"])
            self._idle_deaths += failure is None
            if self._idle_deaths >= _IDLE_DEATHS:
                raise WsiError("worker processes", f"end before they begin a slide ({message['how']})", "See above")
            self._begin(worker.number)
            if task is not None:
                tell(Event("failed" if failure else "lost", task.slide_id, record=failure))
        elif task is not None:  # done, failed, lost
            worker.task = None
            tell(Event(slide_id=task.slide_id, **message))


class _Worker:
    """One worker process and its present task."""

    def __init__(self, job: Job, messages: _Messages, number: int, environment: dict[str, str]) -> None:
        self.number, self.is_ready, self.stage = number, False, ""
        self.task: Task | None = None
        self._began = 0.0
        self._reason: tuple[str, str] | None = None
        command, pipe = [sys.executable, "-m", "wsi.archive.worker"], subprocess.PIPE
        # Ctrl-C reaches the whole process group: the worker inherits a mask that blocks it from the start.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", env=environment
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._send(to_json(job))
        self._listener = threading.Thread(target=self._listen, args=(messages,), daemon=True)
        self._listener.start()

    @property
    def is_free(self) -> bool:
        """Whether it can take a slide; not if it has been killed just after finishing one."""
        return self.is_ready and self.task is None and self._reason is None

    def give(self, task: Task) -> None:
        """Send it a task."""
        self.task, self.stage, self._began = task, "", time.monotonic()
        self._send(asdict(task))

    def check(self, limits: Limits) -> None:
        """Kill it if it exceeds the limits."""
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
        """Raise ``WsiError`` if the memory limit cannot be checked, or is exceeded before the first slide."""
        if limits.memory_bytes is None:
            return
        used, where = _resident_bytes(self._process.pid), f"max_memory={limits.memory_bytes / 2**30:.2f} GiB"
        if not used:
            raise WsiError(where, "this system does not tell what a process uses (no /proc)", "Leave --max-memory out")
        if used > limits.memory_bytes:
            what = f"a worker takes {used / 2**30:.2f} GiB before its first slide"
            raise WsiError(where, what, "Allow more with --max-memory")

    def failure(self, how: str) -> Row | None:
        """Return the failure of the slide that it died on; None if it had not begun one."""
        if self.task is None or not (self.stage or self._reason):
            return None
        crash = "A library crashed on this slide: try another --reader, or convert the slide"
        killed = "Something killed it, perhaps for want of memory: try --max-memory, or a smaller --batch-size"
        what, remedy = self._reason or (f"ended the worker process ({how})", killed if "KILL" in how else crash)
        return failure_row(self.task, self.stage or "open", f"{self.task.ref.path}: {what}", remedy)

    def stop(self) -> None:
        """Close its stdin, upon which it ends."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended; kill it if it does not."""
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
        with suppress(BrokenPipeError):  # it has died, and the listener will report it
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def _listen(self, messages: _Messages) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # a line cut short by its death
                    messages.put((self, json.loads(line)))
        code = self._process.wait()
        messages.put((self, {"kind": "died", "how": _how(code)}))


#: What workers report, and which.
_Messages = queue.SimpleQueue[tuple[_Worker, dict[str, Any]]]


def _how(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _environment(number: int, of: int, devices: int) -> dict[str, str]:
    """Return a worker's environment variables: its own GPU, and its share of the cores."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # spinning threads starve each other on a busy machine
    if devices:
        names = (environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = names[number % devices]
    if of > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, default_threads() // of)))
    return environment


def _resident_bytes(pid: int) -> int:
    """Return the resident memory of a process; 0 if it has ended or there is no /proc."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _error(described: list[str]) -> WsiError:
    """Recreate an error that a worker reported."""
    name, *arguments = described
    return getattr(errors, name)(*arguments)  # type: ignore[no-any-return]


def default_threads() -> int:
    """Return the number of reader threads: one per core, since decoding releases the interpreter lock."""
    return max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2)
