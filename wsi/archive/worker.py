"""A worker process: ``python -m wsi.archive.worker``, started by ``wsi.archive.workers``.

It reads JSON lines from stdin, the job and then one task at a time, and writes events as JSON lines to stdout. Output
of libraries is redirected to stderr. The process ends when stdin does, so that it never outlives its parent.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import Any

from wsi.archive.claims import ClaimLost
from wsi.archive.jobs import END_S, Task, from_json, perform
from wsi.errors import WsiError
from wsi.memory import keep_freed_memory

#: Seconds between two progress reports.
REPORT_S = 0.1


def main() -> None:
    """Process the tasks on stdin."""
    signal.signal(signal.SIGTERM, _stop)
    faulthandler.enable()
    keep_freed_memory()
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # as in the command line
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(kind: str, **more: Any) -> None:
        events.write(json.dumps({"kind": kind, **more}) + "\n")

    def refuse(error: WsiError) -> None:
        tell("refused", error=[type(error).__name__, error.where, error.what, error.remedy])

    lines = _lines()
    try:
        ready = from_json(json.loads(lines.get())).load()
    except WsiError as error:
        return refuse(error)
    gc.collect()
    gc.freeze()  # collections between slides need not scan models and libraries
    # GPUs that further workers could use.
    devices = int(sys.modules["torch"].cuda.device_count()) if ready.execution.get("device") == "cuda" else 0
    tell("ready", configuration=ready.configuration, execution=ready.execution, devices=devices)
    while True:
        task = Task.from_json(json.loads(lines.get()))
        reported, stage_then = 0.0, ""

        def watch(stage: str, done: int, total: int) -> None:
            nonlocal reported, stage_then
            now = time.monotonic()
            if stage != stage_then or now - reported > REPORT_S or done == total:
                reported, stage_then = now, stage
                tell("stage", stage=stage, done=done, total=total)

        try:
            tell(**perform(ready, task, watch))
        except ClaimLost:
            tell("lost")
        except WsiError as error:
            return refuse(error)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _lines() -> queue.SimpleQueue[str]:
    """Read stdin in a thread, so that its end is noticed during a slide."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        threading.Timer(END_S, os._exit, [1]).start()  # in case native code does not return
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    return lines


if __name__ == "__main__":
    try:
        main()
        os._exit(0)  # at once: the end of stdin sends a signal, and Zarr's threads would print errors
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(1)
