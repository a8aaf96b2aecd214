"""All pictures of a shard as a .tar that WebDataset reads: three members a record.

    <key>.original.png, <key>.reconstruction.png, <key>.json

Ids come from outside, and readers unpack archives: a key holds nothing that a file
system takes for anything but a name.
"""

import hashlib
import io
import json
import re
import tarfile
from typing import Any, BinaryIO

import numpy as np

from pipeline.formats import png

# Of 255 bytes in a file name; the longest suffix takes 19.
_MAX_KEY = 200
_DIGEST = 32


def key(record_id: str) -> str:
    """A record's id as the name of its files: letters, digits, - and _; all else as %XX.

    No dot either, since for WebDataset a key ends at the first one. What is too long for a
    file name is cut, and ends in %- and a hash of the whole, as no other key does.
    """
    data = record_id.encode()
    escaped = re.sub(rb"[^A-Za-z0-9_-]", lambda found: b"%%%02X" % found[0][0], data).decode()
    if not escaped or len(escaped) > _MAX_KEY:
        digest = hashlib.sha256(data).hexdigest()[:_DIGEST]
        return f"{escaped[: _MAX_KEY - _DIGEST - 2]}%-{digest}"
    return escaped


class Archive:
    """A .tar that grows record by record; a function of what is put in."""

    def __init__(self, file: BinaryIO):
        """Begins an archive in a file open for writing."""
        # GNU's format, since it knows long names and writes no times of its own.
        self._tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT)

    def add(self, original: np.ndarray, reconstruction: np.ndarray, about: dict[str, Any]) -> None:
        """Adds a record.

        Args:
          original: uint8 (H, W, C).
          reconstruction: the same shape.
          about: what the JSON says, "id" among it.
        """
        name = key(about["id"])
        self._member(f"{name}.original.png", png.png(original))
        self._member(f"{name}.reconstruction.png", png.png(reconstruction))
        text = json.dumps(about, ensure_ascii=False)
        self._member(f"{name}.json", text.encode(errors="backslashreplace"))

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        """Writes the archive's end."""
        self._tar.close()
