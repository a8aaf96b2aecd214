"""Counts the frames of an image file, without decoding: `image_file` decodes only the first."""

import struct
from typing import Any, BinaryIO

# The count stops here, since a damaged directory of a TIFF may lead through each of its bytes.
MAX_FRAMES = 10_000


def num_frames(image: Any, file: BinaryIO) -> int:
    """Frames or pages, at most MAX_FRAMES.

    Args:
      image: an opened Pillow image.
      file: what the image was opened from.
    """
    try:
        if image.format == "GIF":
            return _of_gif(file)
        if image.format == "TIFF":
            return _of_tiff(file)
    except (struct.error, IndexError):  # The file ends early; its first frame may be whole.
        return 1
    # For these formats Pillow knows the number from the header.
    return min(getattr(image, "n_frames", 1), MAX_FRAMES)


def _of_tiff(file: BinaryIO) -> int:
    """Follows the chain of directories (TIFF 6.0, section 2)."""
    file.seek(0)
    start = file.read(8)
    order = "<" if start.startswith(b"II") else ">"
    is_big = 43 in (start[2], start[3])  # BigTIFF has offsets of 8 bytes.
    number, entry_bytes, offset_kind = ("Q", 20, "Q") if is_big else ("H", 12, "I")

    def read(at: int, kind: str) -> int:
        file.seek(at)
        return int(struct.unpack(order + kind, file.read(struct.calcsize(order + kind)))[0])

    seen: set[int] = set()
    offset = read(8 if is_big else 4, offset_kind)
    file_bytes = file.seek(0, 2)
    while 0 < offset < file_bytes and offset not in seen and len(seen) < MAX_FRAMES:
        seen.add(offset)
        after = offset + struct.calcsize(number) + entry_bytes * read(offset, number)
        if after >= file_bytes:
            break
        offset = read(after, offset_kind)
    return max(len(seen), 1)


def _of_gif(file: BinaryIO) -> int:
    """Passes over all blocks (GIF89a, appendix A), in time linear in the file's size."""
    file.seek(0)
    data = file.read()
    frames, at = 0, 13 + _colour_bytes(data[10])
    while at < len(data) and frames < MAX_FRAMES:
        if data[at] == 0x2C:  # An image: a descriptor, its colours, a byte, and blocks.
            frames += 1
            at += 11 + _colour_bytes(data[at + 9])
        elif data[at] == 0x21:  # An extension: two bytes and blocks.
            at += 2
        else:  # The end.
            break
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return max(frames, 1)


def _colour_bytes(flags: int) -> int:
    """The bytes of a colour table that a block's flags state."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
