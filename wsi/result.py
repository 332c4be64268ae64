"""The result of a finished slide, and the time it took."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsi.files import write_json

#: The picture that ``wsi score --explain`` adds to a slide's folder.
EXPLAINED = "explained.png"
#: Called with the stage, the amount done and the total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SlideResult:
    """A finished slide: the content of result.json, and the seconds that each stage took."""

    numbers: dict[str, Any]
    seconds: dict[str, float]


def write_result(folder: Path, result: SlideResult) -> None:
    """Write seconds.json, and then result.json, which marks the slide as done."""
    write_json(folder / "seconds.json", {stage: round(value, 3) for stage, value in result.seconds.items()})
    write_json(folder / "result.json", result.numbers)


def read_result(folder: Path) -> SlideResult | None:
    """Return the result in a slide's folder, or None if the slide is not finished."""
    try:
        numbers = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return SlideResult(numbers, seconds) if isinstance(numbers, dict) and "slide_id" in numbers else None


def rounded(value: float) -> float:
    """Round to six significant digits.

    Examples
    --------
    >>> rounded(1 / 3)
    0.333333
    """
    return float(f"{value:.6g}")


class Stopwatch:
    """Seconds by name, summed over all threads that measure.

    Examples
    --------
    >>> spent = Stopwatch()
    >>> with spent("decode"):
    ...     pass
    >>> list(spent.seconds)
    ['decode']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + took


class Laps:
    """Where the time of a loop goes: each call adds the time since the last call to a name."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now


def called(probabilities: npt.NDArray[Any], positive: npt.NDArray[np.bool_], threshold: float) -> npt.NDArray[np.int64]:
    """Return the class, int64 (n,), of tiles or slides with `probabilities` (n, k).

    It is the likeliest `positive` class, bool (k,), where the positive classes together reach the threshold, and else
    the likeliest of the others. If none or all are positive, it is simply the likeliest class.

    Examples
    --------
    >>> called(np.array([[0.4, 0.3, 0.3], [0.5, 0.3, 0.2]]), np.array([False, True, True]), 0.55).tolist()
    [1, 0]
    """
    if not positive.any() or positive.all():
        return np.asarray(probabilities.argmax(axis=1), np.int64)
    is_positive = probabilities[:, positive].sum(axis=1) >= threshold
    allowed = np.where(is_positive[:, None], positive, ~positive)
    return np.asarray(np.where(allowed, probabilities, -1.0).argmax(axis=1), np.int64)


class Clock(Stopwatch):
    """Seconds spent in each stage, with progress reports."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a stage, and yield a function that reports the amount done and the total."""
        with self(name):
            self._progress(name, 0, 0)
            yield lambda done, total: self._progress(name, done, total)
