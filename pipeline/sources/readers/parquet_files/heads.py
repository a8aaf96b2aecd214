"""What the headers of the images of a file say."""

import io
from typing import NamedTuple

from pipeline.sources.image_file import RefusedNow, read_header
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.parquet_files import values
from pipeline.sources.readers.parquet_files.copying import Copy

Shape = tuple[int, int, int]


class Heads(NamedTuple):
    """The headers of a file's images; JSON."""

    shapes: list[tuple[Shape, int]]  # And the number of images, in the order of their first rows.
    num_of_16_bits: int
    refused: tuple[int, str] | None  # The first row whose image is not read, and the reason.
    num_tiffs: int  # TIFFs that are not allowed.


def heads_of(copy: Copy, number: int, options: SourceOptions) -> Heads:
    """Reads the headers of a file, by its number in the copy."""
    shapes: dict[Shape, int] = {}
    num_of_16_bits, num_tiffs, refused = 0, 0, None
    first, end = copy.starts[number : number + 2].tolist()
    if (copy.rows[number].shapes[:, 0] <= 0).any():  # Pixels in lists need no look.
        copy.load([number])
    for index, row_shape in enumerate(copy.shapes[first:end].tolist(), first):
        shape = tuple(row_shape)
        if values.is_fault(row_shape) or values.is_encoded(row_shape):
            data = copy.read(*copy.offsets[index : index + 2].tolist())
            try:
                if values.is_fault(row_shape):
                    raise ValueError(data.decode())
                header = read_header(
                    io.BytesIO(data),
                    options.max_image_pixels,
                    options.background,
                    allow_tiff=options.allow_tiff,
                )
            except ValueError as error:
                refused = refused or (index - first, str(error))
                # Otherwise TIFFs are refused for what they hold.
                num_tiffs += isinstance(error, RefusedNow) and not options.allow_tiff
                continue
            shape = header.shape
            num_of_16_bits += header.is_of_16_bits
        shapes[shape] = shapes.get(shape, 0) + 1
    return Heads(list(shapes.items()), num_of_16_bits, refused, num_tiffs)
