"""Leases on slides: how processes and machines that share a folder divide the work, without a server.

A claim is a file ``NAME.TOKEN``, created exclusively (``O_EXCL``: atomic on local disks and on NFS since version 3).
The highest token of a name is valid. Its owner writes a heartbeat into the file every few seconds. A contender takes
the next token once the owner is dead: at once if its process is known to have ended on this machine, else after the
file has not changed for a while *by the contender's own monotonic clock*. The clocks of two machines are never
compared. An owner that was only suspended finds a higher token, or its file gone, and gives up before it writes a
result: the token is a fencing token (Kleppmann 2016, "How to do distributed locking").
"""

from __future__ import annotations

import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from wsi.files import time_beside

#: Seconds between heartbeats, and of silence after which an owner counts as dead: several missed beats, and more than
#: NFS caches attributes for (60).
BEAT_S, SILENCE_S = 10.0, 90.0

_AGAIN_S = 0.05  # between two attempts to take a claim
_GONE = (errno.ENOENT, errno.ESTALE)  # ESTALE: another machine has just removed the file (NFS)
_BYTES = 512  # of a claim file, so that a heartbeat is one write in place


class ClaimLost(Exception):
    """Another process has taken the slide over: nothing more may be written to its folder."""


@dataclass(frozen=True)
class Claim:
    """A claim that we have made on a name. `nonce` identifies us in its file `path`."""

    path: str
    nonce: str

    def holds(self) -> bool:
        """Whether the claim is still ours."""
        path = Path(self.path)
        name, token = _parts(path.name)
        if _read(path).get("nonce") != self.nonce:
            return False
        return max(_tokens(path.parent, name), default=0) == token

    def confirm(self) -> None:
        """Raise ``ClaimLost`` if it is not."""
        if not self.holds():
            raise ClaimLost(self.path)


class Claims:
    """The claims of one run in one folder; while it is open, a thread writes their heartbeats.

    The folder is created if needed, and removed when empty. `clock` gives monotonic seconds. `began` is when the run
    began, by the file system's clock.

    Examples
    --------
    >>> with Claims("out/.claims") as claims:                            # doctest: +SKIP
    ...     claim = claims.take("slide-1")
    ...     if claim is not None:
    ...         claim.confirm()
    ...         claims.release(claim)
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, beat_s: float = BEAT_S, silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._folder, self._beat_s, self._silence_s, self._clock = Path(folder), beat_s, silence_s, clock
        self.began = 0.0
        self._held: dict[Claim, IO[bytes]] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="wsi-claims", daemon=True)

    def __enter__(self) -> Self:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self.began = time_beside(self._folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for claim in list(self._held):
            self.release(claim)
        with suppress(OSError):  # others' claims are in the folder, or it is gone
            for path in self._folder.iterdir():  # claims of processes killed just after their slide was done
                if self._is_dead(path):
                    path.unlink(missing_ok=True)
            self._folder.rmdir()

    def take(self, name: str) -> Claim | None:
        """Claim a name; None if a living owner has it. Raises OSError if the folder cannot be written to."""
        tokens = _tokens(self._folder, name)
        highest = max(tokens, default=0)
        if highest and not self._is_dead(self._folder / f"{name}.{highest}"):
            return None
        path = self._folder / f"{name}.{highest + 1}"
        try:
            file = self._make(path)
        except FileExistsError:
            return None
        claim = Claim(str(path), uuid.uuid4().hex)
        try:
            _write(file, claim.nonce, 0)
            with self._lock:
                self._held[claim] = file
        except BaseException:  # a full disk: others would have to wait for the silence of an empty claim
            file.close()
            path.unlink(missing_ok=True)
            raise
        for token in tokens:
            (self._folder / f"{name}.{token}").unlink(missing_ok=True)
        if not claim.holds():  # someone else took a higher token meanwhile
            self.release(claim)
            return None
        return claim

    @contextmanager
    def holding(self, name: str) -> Iterator[Claim]:
        """Claim a name for a block; wait until its owner has released it or is dead."""
        while (claim := self.take(name)) is None:
            self._end.wait(_AGAIN_S)
        try:
            yield claim
        finally:
            self.release(claim)

    def release(self, claim: Claim) -> None:
        """Release a claim."""
        with self._lock:
            file = self._held.pop(claim, None)
        if file is not None:
            file.close()
        path = Path(claim.path)
        if _read(path).get("nonce") == claim.nonce:
            path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Write one heartbeat into each claim. A claim that we have lost is a deleted file, where that does no harm."""
        with self._lock:
            for claim, file in self._held.items():
                with suppress(OSError):  # a lost claim is noticed by `confirm`
                    _write(file, claim.nonce, time.monotonic_ns())

    def _make(self, path: Path) -> IO[bytes]:
        """Create a file, and the folder, which another run may remove at any moment as it ends."""
        for _ in range(100):
            self._folder.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                return path.open("xb", buffering=0)
        return path.open("xb", buffering=0)

    def _keep_beating(self) -> None:
        while not self._end.wait(self._beat_s):
            self.beat()

    def _is_dead(self, path: Path) -> bool:
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            if error.errno in _GONE:
                return True
            raise
        owner = _owner(text)
        known = owner.get("host") == _host() and owner.get("began") is not None and owner.get("pid") is not None
        if known and _began(int(owner["pid"])) != owner["began"]:
            return True
        now = self._clock()
        earlier, since = self._seen.get(path.name, ("", now))
        if text != earlier:
            since = now
        self._seen[path.name] = text, since
        return now - since >= self._silence_s


def _parts(name: str) -> tuple[str, int]:
    head, _, token = name.rpartition(".")
    return (head, int(token)) if head and token.isdecimal() else ("", 0)


def _tokens(folder: Path, name: str) -> list[int]:
    try:
        found = [_parts(file) for file in os.listdir(folder)]  # noqa: PTH208
    except OSError as error:
        if error.errno in _GONE:
            return []
        raise
    return [token for head, token in found if head == name]


def _read(path: Path) -> dict[str, str]:
    try:
        return _owner(path.read_text(errors="replace"))
    except OSError:
        return {}


def _owner(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: IO[bytes], nonce: str, beat: int) -> None:
    owner = {"nonce": nonce, "host": _host(), "pid": os.getpid(), "began": _began(os.getpid()), "beat": beat}
    os.pwrite(file.fileno(), json.dumps(owner).encode().ljust(_BYTES), 0)
    os.fsync(file.fileno())  # other machines see only what has been synced


def _host() -> str:
    """Identify this machine, its current boot, and its space of process ids (a container has its own)."""
    known = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            known.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())  # noqa: PTH115
    return " ".join(known)


def _began(pid: int) -> str | None:
    """Return when a process of this machine began; None if it does not exist or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
