"""Reads image files through the sources, and in plain loops of Pillow and pyarrow, in turn.

python -m tests.benchmarks.bench_sources
"""

import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from pipeline.sources import open_source
from tests.sources.test_five_ways import png

_NUM_IMAGES, _TURNS, _BLOCK = 10_000, 7, 1_000


def _read_source(spec: str) -> Callable[[], None]:
    source = open_source(spec)
    indices = np.arange(sum(source.split_sizes.values()))

    def read() -> None:
        for first in range(0, len(indices), _BLOCK):
            images, _ = source.read(indices[first : first + _BLOCK])
            for image in images:
                assert image.shape == (28, 28, 1)

    return read


def _read_folder(paths: list[pathlib.Path]) -> Callable[[], None]:
    def read() -> None:
        for path in paths:
            with open(path, "rb") as file, Image.open(io.BytesIO(file.read())) as image:
                assert np.asarray(image).shape == (28, 28)

    return read


def _read_parquet(path: pathlib.Path) -> Callable[[], None]:
    import pyarrow.parquet as pq

    def read() -> None:
        for batch in pq.ParquetFile(path).iter_batches(_BLOCK):
            for value in batch.column("image").field("bytes"):
                with Image.open(io.BytesIO(value.as_py())) as image:
                    assert np.asarray(image).shape == (28, 28)

    return read


def _compare(name: str, source: Callable[[], None], plain: Callable[[], None]) -> None:
    """Prints rates, and the median of the ratios of neighbouring runs."""
    source(), plain()
    secs: dict[Callable[[], None], list[float]] = {source: [], plain: []}
    for turn in range(_TURNS):
        for work in (source, plain) if turn % 2 else (plain, source):
            started = time.process_time()
            work()
            secs[work].append(time.process_time() - started)
    ratios = [b / a for a, b in zip(secs[source], secs[plain], strict=True)]
    rates = [_NUM_IMAGES / statistics.median(secs[work]) for work in (source, plain)]
    print(
        f"{name}: {rates[0]:,.0f} images/s of CPU, plain loop {rates[1]:,.0f}; "
        f"{statistics.median(ratios):.2f} × its speed"
    )


def main() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images, labels = open_source("sample").read(np.arange(_NUM_IMAGES))
    files = [png(image[..., 0]) for image in images]
    with tempfile.TemporaryDirectory() as scratch:
        folder, table = pathlib.Path(scratch, "folder"), pathlib.Path(scratch, "train.parquet")
        paths = []
        for number, (data, label) in enumerate(zip(files, labels.tolist(), strict=True)):
            paths.append(folder / str(label) / f"{number}.png")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_bytes(data)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = pa.array([{"bytes": data, "path": None} for data in files], kind)
        pq.write_table(pa.table({"image": rows, "label": labels}), table, row_group_size=1_000)
        _compare("folder", _read_source(f"folder:{folder}"), _read_folder(paths))
        _compare("parquet", _read_source(f"parquet:{table}"), _read_parquet(table))


if __name__ == "__main__":
    main()
