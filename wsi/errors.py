"""Every error this package raises on purpose. Each says where, what is wrong, and what to do about it.

::

    WsiError                  where, what, remedy
    |-- SlideError
    |   |-- SlideNotFound     also FileNotFoundError
    |   |-- SlideUnreadable   also ValueError
    |   |   |-- UnknownFormat
    |   |   `-- NotRgb
    |   `-- MppError          also ValueError
    |-- GridError             also ValueError
    |-- StainError            also ValueError
    |-- StoreError            also ValueError
    |-- ModelError            also ValueError
    |   `-- ModelNotFound     also LookupError
    |-- TrainError            also ValueError
    |-- ConfigMismatch        also ValueError
    |-- ManifestError         also ValueError
    |-- AnnotationError       also ValueError
    |-- ResultsError          also ValueError
    |-- EvaluationError       also ValueError
    `-- OutputError           also OSError
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class WsiError(Exception):
    """Base of all errors raised on purpose.

    Parameters
    ----------
    where : str or path
        The file, argument or object at fault.
    what : str
        What is wrong with it.
    remedy : str
        What the user can do about it.
    """

    def __init__(self, where: str | os.PathLike[str], what: str, remedy: str = "") -> None:
        self.where = os.fspath(where)
        self.what = what
        self.remedy = remedy
        super().__init__(self.where, what, remedy)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        return f"{text}. {self.remedy}" if self.remedy else text


class SlideError(WsiError):
    """Something is wrong with one slide or with how it is to be read."""


class SlideNotFound(SlideError, FileNotFoundError):
    """There is no slide at this path."""


class SlideUnreadable(SlideError, ValueError):
    """The file is not a slide, is damaged, or holds pixels that are not 8-bit colour."""


class UnknownFormat(SlideUnreadable):
    """The reader does not know this format."""


class NotRgb(SlideUnreadable):
    """The file stores its channels as separate pages: fluorescence, or a heatmap."""


class MppError(SlideError, ValueError):
    """The slide has no plausible microns per pixel."""


class GridError(WsiError, ValueError):
    """A tile size, stride, level or resolution from which no grid can be made."""


class StainError(WsiError, ValueError):
    """Pixels, a stain matrix or a target that stain normalisation cannot use."""


class StoreError(WsiError, ValueError):
    """A patch store that is damaged or of another layout."""


class ModelError(WsiError, ValueError):
    """A model folder that cannot be used."""


class ModelNotFound(ModelError, LookupError):
    """No model of that name; the known ones are listed."""


class TrainError(WsiError, ValueError):
    """Bags, labels or splits that cannot be trained on."""


class ConfigMismatch(WsiError, ValueError):
    """The results folder was made with another configuration."""


class ManifestError(WsiError, ValueError):
    """A manifest that cannot be used; the row is named."""


class AnnotationError(WsiError, ValueError):
    """An annotation file or mask that cannot be used."""


class ResultsError(WsiError, ValueError):
    """A results folder that holds no results, or not those that are needed."""


class EvaluationError(WsiError, ValueError):
    """Results and a reference that cannot be compared; what is missing is named."""


class OutputError(WsiError, OSError):
    """Results cannot be written: no permission, a full disk, or a file in the way."""

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str]) -> OutputError:
        """Translate an ``OSError`` raised while writing `path` into an error with a remedy."""
        remedies = {
            errno.ENOSPC: "Free some space and run the same command again: it resumes",
            errno.EDQUOT: "Your quota is used up; free some space and run the same command again: it resumes",
            errno.EACCES: "Choose a folder you may write to with -o",
            errno.EPERM: "Choose a folder you may write to with -o",
            errno.EROFS: "The file system is read-only; choose another folder with -o",
            errno.ENOTDIR: "A file stands where a folder is needed; choose another folder with -o",
            errno.EIO: "The disk fails, or the network to it; the same command goes on when it is well again",
            errno.EEXIST: "A file stands where a folder is needed; choose another folder with -o",
        }
        what = f"cannot be written ({error.strerror or error})"
        mapped = cls(error.filename or path, what, remedies.get(error.errno or 0, ""))
        mapped.errno = error.errno
        return mapped


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; the name of its type if it has none."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def is_output_error(error: OSError, folder: str | os.PathLike[str]) -> bool:
    """Whether an ``OSError`` means that `folder` cannot be written to, rather than that something cannot be read."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
        return True
    inside = Path(os.fsdecode(error.filename or "")).absolute().is_relative_to(Path(folder).absolute())
    return inside and error.errno in {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO, errno.ESTALE}
