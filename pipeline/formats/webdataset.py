"""All pictures of a shard as a .tar for WebDataset: three members a record.

    <key>.original.png, <key>.reconstruction.png, <key>.json

Ids come from outside, and readers unpack archives, so a key holds only characters that are safe in
file names.
"""

import hashlib
import io
import json
import re
import tarfile
from typing import Any, BinaryIO

import numpy as np

from pipeline.formats import png

# A file name has at most 255 bytes; the longest suffix takes 19.
_MAX_KEY = 200
_DIGEST = 32


def key(record_id: str) -> str:
    """A record's id as a file name: letters, digits, - and _; all other bytes as %XX.

    A dot is escaped too, since WebDataset ends a key at the first dot. A key that is too long is
    cut, and ends in %- and a hash of the id, as no other key does.
    """
    data = record_id.encode()
    escaped = re.sub(rb"[^A-Za-z0-9_-]", lambda match: b"%%%02X" % match[0][0], data).decode()
    if not escaped or len(escaped) > _MAX_KEY:
        digest = hashlib.sha256(data).hexdigest()[:_DIGEST]
        return f"{escaped[: _MAX_KEY - _DIGEST - 2]}%-{digest}"
    return escaped


class Archive:
    """A .tar that grows record by record; its bytes are a function of the records."""

    def __init__(self, file: BinaryIO):
        """Begins an archive in a file that is open for writing."""
        # GNU's format has long names and adds no times.
        self._tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT)

    def add(self, original: np.ndarray, reconstruction: np.ndarray, about: dict[str, Any]) -> None:
        """Adds a record.

        Args:
          original: uint8 (H, W, C).
          reconstruction: the same shape.
          about: content of the JSON member, with the key "id".
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
