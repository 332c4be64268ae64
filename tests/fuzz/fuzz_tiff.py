"""Coverage-guided fuzzing of opening and reading TIFF slides.

    pip install -e '.[fuzz]'
    nice -n 15 python -m tests.fuzz.fuzz_tiff --reader tiff --seconds 3600 --corpus FOLDER
    python -m tests.fuzz.fuzz_tiff --reader tiff --replay FILE...

A slide is read, or refused with a SlideError of one line; all else is a finding: another exception, a crash, more than
10 s, more than 512 MiB used or 4 GiB asked for, other pixels when read again, or what can be read in full and not when
the decoder reduces it. Seeds are the slides of `tests.slide.make.tiny_slides`; FOLDER keeps what reached new code, for
the next time. A finding is cut down as far as it stays the same finding and saved as FOLDER/finding-*.tif.

The fuzzing itself runs in a child process, which a native decoder may kill; it is then started again. Its log says by
which signal it died and where in Python, and FOLDER/died-N holds the last inputs, the newest last: what killed it may
be an earlier one, so replay them in one process, by --together.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import itertools
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

SECONDS_LIMIT = 10
MEMORY_LIMIT = 1 << 29  # of memory used
ADDRESS_LIMIT = 1 << 32  # of memory asked for: more is an error at once
CORNER_PX = 300
ROW_PX = 1 << 18
MOST_PX = 1 << 24  # reading more may take long, as whoever asks for it knows
MEMORY_EXIT = 3  # status of a process that used too much, which is a finding of its own
LAST = 500  # inputs that are kept for when the process dies


class Fault(Exception):
    """Pixels or messages that are not as promised."""


def read_slide(path: Path, reader: str) -> None:
    """Open a slide and read some of every level; what is not as promised is raised."""
    from wsi.errors import SlideError, SlideUnreadable
    from wsi.slide import open_slide
    from wsi.slide.tiffcheck import check_tiff
    from wsi.units import Box

    data, seen = path.read_bytes(), set()
    try:
        if reader in ("openslide", "tiffslide"):  # the others begin with it
            check_tiff(lambda offset, length: data[offset : offset + length], len(data), str(path))
        for decode in ("full", "auto", "fast") if reader in ("tiff", "auto") else ("auto",):
            with open_slide(path, reader, mpp=0.5, decode=decode) as slide:
                for box, out_px in views(slide.level_sizes):
                    try:
                        pixels = slide.read(Box(*box), out_px)
                    except SlideUnreadable as error:
                        if (box, out_px) in seen:
                            raise Fault(f"read in full, and not with decode={decode}") from error
                        raise
                    seen.add((box, out_px))
                    if pixels.shape != (*out_px[::-1], 3) or not (pixels == slide.read(Box(*box), out_px)).all():
                        raise Fault("other pixels when read again")
    except SlideError as error:
        if "\n" in str(error) or str(path) not in str(error):
            raise Fault(f"a message of several lines or without the file: {error!r}") from error
        said, cause = [], error
        while cause is not None:
            said += [type(cause).__name__, str(cause)]
            cause = cause.__cause__ or cause.__context__
        if re.search("memory|allocat", " ".join(said), re.IGNORECASE):
            raise Fault(f"wanted more than {ADDRESS_LIMIT} bytes") from error


def views(level_sizes: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[float, ...], tuple[int, int]]]:
    """Boxes to read, and into how many pixels: corners of each level, all of it, a row of it."""
    width, height = level_sizes[0]
    for w, h in level_sizes:
        scale_x, scale_y = width / w, height / h
        side_x, side_y = min(w, CORNER_PX), min(h, CORNER_PX)
        for x, y in {(0, 0), (w - side_x, h - side_y)}:
            yield (x * scale_x, y * scale_y, side_x * scale_x, side_y * scale_y), (side_x, side_y)
        across, down = -(-w // 512), -(-h // 512)
        if w * h <= MOST_PX:
            yield (0, 0, width, height), (across, down)
        row = min(w, ROW_PX)
        yield (0, height / 2, row * scale_x, scale_y), (-(-row // 512), 1)


def signature(error: BaseException) -> str:
    """What kind of finding an exception is: its type and where it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    root = error.__cause__ if isinstance(error, Fault) and error.__cause__ else error
    words = str(error)[:40].lower() if isinstance(error, Fault) else ""
    said = f"{type(root).__name__} {Path(frame.filename).stem} {frame.name} {words}"
    return re.sub(r"[^A-Za-z0-9_]+", "-", said).strip("-")


def limit_memory() -> None:
    """Let the process ask for `ADDRESS_LIMIT` more than it has now."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + ADDRESS_LIMIT, resource.RLIM_INFINITY))


def try_apart(data: bytes, reader: str, path: Path) -> str:
    """Read a slide in a forked process within the limits: the finding's signature, or "" where all is as promised."""
    path.write_bytes(data)
    pipe_out, pipe_in = os.pipe()
    if not (child := os.fork()):
        found = ""
        try:
            with Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), 2)
            limit_memory()
            begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(SECONDS_LIMIT)
            try:
                read_slide(path, reader)
            except BaseException as error:  # noqa: BLE001
                found = signature(error)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun > MEMORY_LIMIT >> 10:
                found = found or "memory"
            os.write(pipe_in, found.encode())
        finally:
            os._exit(0)
    os.close(pipe_in)
    with os.fdopen(pipe_out, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "timeout" if number == signal.SIGALRM else f"signal-{signal.Signals(number).name}"
    return said


def minimise(data: bytes, reader: str, path: Path, seconds: float = 120) -> bytes:
    """Cut pieces out of a finding, or set them to zero, as long as it stays the same finding."""
    end, found = time.monotonic() + seconds, try_apart(data, reader, path)
    size = len(data) // 2
    while size and found:
        place = 0
        while place < len(data) and time.monotonic() < end:
            without = data[:place] + data[place + size :]
            zeroed = data[:place] + bytes(len(data[place : place + size])) + data[place + size :]
            for smaller in (without, zeroed):
                if smaller != data and try_apart(smaller, reader, path) == found:
                    data = smaller
                    break
            else:
                place += size
                continue
            place += 0 if smaller is without else size
        size //= 2
    return data


INTERESTING = [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 255, 256, 4096, 16384, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, -1]
TAGS = [254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 282, 284, 296, 305, 317, 322, 323, 324, 325]
TAGS += [330, 338, 339, 347, 513, 529, 530, 532, 32997, 32998, 33628, 34118, 34361, 42113, 50838, 51023, 65420, 65426]
COMPRESSIONS = [1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 33003, 33004, 33005, 33007, 34712, 34887, 34892, 34925, 34933]
COMPRESSIONS += [34934, 50000, 50001, 50002, 50013]


def mutate_tag(data: bytes, seed: int) -> bytes:
    """Change one field of one tag to something that a reader may stumble over."""
    rng, new = random.Random(seed), bytearray(data)
    order = "little" if data[:2] == b"II" else "big"
    head, wide = (8, 8) if data[2:4] in (b"+\0", b"\0+") else (2, 4)
    entry = 4 + 2 * wide

    def get(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], order)

    def put(place: int, size: int, value: int) -> None:
        if 0 <= place <= len(new) - size:
            new[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, order)

    directories, offset = [], get(wide, wide)  # the first one's place is in bytes 4-7, or 8-15
    while 0 < offset < len(data) and offset not in directories and len(directories) < 9:
        directories.append(offset)
        offset = get(offset + head + get(offset, head) * entry, wide)
    if not directories:
        return data
    directory = rng.choice(directories)
    place = directory + head + entry * rng.randrange(max(1, min(get(directory, head), 40)))
    code, kind, count = get(place, 2), get(place + 2, 2), get(place + 4, wide)
    size = {3: 2, 4: 4, 5: 8, 16: 8}.get(kind, 1)
    values = COMPRESSIONS if code == 259 else [*INTERESTING, len(data) - 1, rng.randrange(len(data)), *directories]
    match rng.randrange(8):
        case 0:
            put(place, 2, rng.choice(TAGS))
        case 1:
            put(place + 2, 2, rng.randrange(20))
        case 2:
            put(place + 4, wide, rng.choice([*INTERESTING, count + 1, count - 1]))
        case 3:
            put(place + 4 + wide, wide, rng.choice(values))
        case _:
            first = place + 4 + wide if count * size <= wide else get(place + 4 + wide, wide)
            put(first + size * rng.randrange(max(1, min(count, 99))), size, rng.choice(values))
    return bytes(new)


def load_readers() -> None:
    """Import what reads slides, so that a forked process need not; and let tifffile be silent about damage."""
    for name in ("imagecodecs", "wsi.slide.tiff", "wsi.slide.openslide", "wsi.slide.tiffslide"):
        import_module(name)
    warnings.simplefilter("ignore")
    logging.disable()


def fuzz(reader: str, corpus: Path, seconds: int, seed: int, last: Path) -> None:
    """Fuzz in this process until time is up or it dies; findings that are mere exceptions are saved on the way.

    The folder `last` holds the last inputs.
    """
    import atheris

    with atheris.instrument_imports(include=["tifffile", "tiffslide", "wsi.slide"]):
        load_readers()
    executions = itertools.count()
    known: set[str] = {name.name.split("--")[0] for name in corpus.glob("raw-*")}
    limit_memory()
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(data: bytes) -> None:
        number = next(executions)
        if not number:
            faulthandler.enable()  # after libFuzzer's own handlers, which it calls in the end
        path = last / f"{number % LAST}.tif"
        path.write_bytes(data)
        os.utime(path, ns=(number, number))  # their order
        found = said = ""
        try:
            read_slide(path, reader)
        except Exception as error:  # noqa: BLE001
            found, said = signature(error), repr(error.__cause__ or error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun > MEMORY_LIMIT >> 10
        if grown:
            found = found or "memory"
        if found and f"raw-{found}" not in known:
            known.add(f"raw-{found}")
            print(f"{found}: {said}", flush=True)  # to the log
            (corpus / f"raw-{found}--{hashlib.sha1(data).hexdigest()[:8]}.tif").write_bytes(data)
        if grown:
            os._exit(MEMORY_EXIT)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        return mutate_tag(data, seed)[:max_size] if seed % 2 else atheris.Mutate(data, max_size)

    arguments = [sys.argv[0], f"-max_total_time={seconds}", f"-timeout={SECONDS_LIMIT}", f"-seed={seed}"]
    arguments += ["-rss_limit_mb=0", "-max_len=8192", "-len_control=0", "-print_final_stats=1"]
    arguments += [f"-artifact_prefix={corpus}/raw-died--", str(corpus / "kept")]
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def supervise(reader: str, corpus: Path, seconds: int) -> int:
    """Run `fuzz` in children until `seconds` are used; cut down and save what they found. Returns the findings."""
    from tests.slide.make import tiny_slides

    (corpus / "kept").mkdir(parents=True, exist_ok=True)
    for name, data in tiny_slides().items():
        (corpus / "kept" / f"seed-{name}").write_bytes(data)
    begun, runs, executions = time.monotonic(), 0, 0
    while (left := seconds - (time.monotonic() - begun)) > 5:
        runs += 1
        command = [sys.executable, "-m", "tests.fuzz.fuzz_tiff", "--reader", reader, "--corpus", str(corpus)]
        command += ["--seconds", str(int(left)), "--child", str(runs + random.randrange(1 << 20))]
        found = len(list(corpus.glob("raw-*")))
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as last:
            with (corpus / f"log-{int(time.time())}-{runs}.txt").open("w") as log:
                done = subprocess.run(
                    [*command, "--last", last],
                    stdout=log, stderr=subprocess.STDOUT, check=False, timeout=left + 300,
                )  # fmt: skip
            if done.returncode not in (0, MEMORY_EXIT):
                inputs = sorted(Path(last).iterdir(), key=lambda path: path.stat().st_mtime_ns)
                (corpus / f"died-{runs}").mkdir(exist_ok=True)
                for i, path in enumerate(inputs):
                    shutil.copy(path, corpus / f"died-{runs}" / f"{i:03}.tif")
                print(f"process {runs} died: see {log.name} and {corpus / f'died-{runs}'}", flush=True)
        if done.returncode and len(list(corpus.glob("raw-*"))) == found:
            raise RuntimeError(f"the fuzzing itself failed: see {log.name}")
        counted = re.findall(r"^(?:stat::number_of_executed_units: |#)(\d+)", Path(log.name).read_text(), re.MULTILINE)
        executions += max(map(int, counted), default=0)
    print(f"{time.monotonic() - begun:.0f} s, {executions} executions, {runs} processes")
    load_readers()
    findings = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        for raw in sorted(corpus.glob("raw-*")):
            found = try_apart(raw.read_bytes(), reader, path)
            if not found or found in findings:
                print(f"{raw.name}: {found or 'nothing, when tried again'}")
                continue
            small = minimise(raw.read_bytes(), reader, path)
            findings[found] = corpus / f"finding-{found}.tif"
            findings[found].write_bytes(small)
            print(f"{findings[found].name}: {len(small)} bytes")
    return len(findings)


def replay(reader: str, files: list[Path], *, together: bool) -> int:
    """Try files one by one within the limits; print what each gives, and return how many are findings.

    `together`: in this process, again and again for a minute, where one may trip over what another left in memory.
    """
    load_readers()
    if together:
        faulthandler.enable()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for file in files:
                with contextlib.suppress(Exception):
                    read_slide(file, reader)
        print("nothing died")
        return 0
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            found = try_apart(file.read_bytes(), reader, Path(folder) / "a.tif")
            bad += bool(found)
            print(f"{file.name}: {found or 'ok'}")
    return bad


def main() -> None:
    """Fuzz, or replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default="tiff", choices=("tiff", "openslide", "tiffslide", "auto"))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--together", action="store_true", help="replay all in one process, for a minute")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child is not None:
        fuzz(chosen.reader, chosen.corpus, chosen.seconds, chosen.child, chosen.last)
    elif chosen.replay:
        sys.exit(bool(replay(chosen.reader, chosen.replay, together=chosen.together)))
    else:
        sys.exit(bool(supervise(chosen.reader, chosen.corpus, chosen.seconds)))


if __name__ == "__main__":
    main()
