"""Pseudonyms of slides: keyed hashes of their names.

File names often contain the number of a patient or a case. The pseudonym is an HMAC (RFC 2104) with SHA-256: the same
key gives the same pseudonym in every export, and without the key nobody can find the name by trying names.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from wsi.errors import OutputError

_MIN_KEY_BYTES = 16
_MAX_KEY_BYTES = 4096


def read_key(path: str | os.PathLike[str]) -> bytes:
    """Read a key file: its bytes, without surrounding whitespace.

    Raises
    ------
    OutputError
        It cannot be read, has fewer than 16 bytes, which could be guessed, or more than 4096.

    Examples
    --------
    >>> _ = Path("key").write_text("correct horse battery staple")
    >>> read_key("key")
    b'correct horse battery staple'
    """
    remedy = "Make one: openssl rand -hex 32 > key"
    try:
        with Path(path).open("rb") as file:
            key = file.read(_MAX_KEY_BYTES + 1).strip()
    except OSError as error:
        raise OutputError(path, f"cannot be read ({error.strerror or error})", remedy) from error
    if not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
        raise OutputError(path, f"is no key of {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} bytes", remedy)
    return key


def pseudonym(slide_id: str, key: bytes | None) -> str:
    """Return a slide's pseudonym, or its own id without a key.

    Examples
    --------
    >>> pseudonym("Doe_John_2019", b"correct horse battery staple")
    's-61c241981bc8d22bd45d'
    """
    return slide_id if key is None else "s-" + hmac.new(key, slide_id.encode(), hashlib.sha256).hexdigest()[:20]
