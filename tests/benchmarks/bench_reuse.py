"""Times what checking the rows that a night takes over costs: part of `make bench`.

    python -m tests.benchmarks.bench_reuse

Other files lie in the page cache, so this is the cost of hashing and not of a disk.
"""

import shutil
import tempfile

from pipeline.cli import quiet
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files
from tests.benchmarks import bench_export
from tests.benchmarks.timing import median_secs, report
from tests.conftest import make_embeddings

_NUM_ROWS = 100_000


def _of_that_size(directory, entry, **_):
    """Takes the place of `intact_entry`: only the size is compared."""
    path = files.join(directory, entry["name"])
    return entry if files.num_bytes(path) == entry["bytes"] else None


def main() -> None:
    """Prints the time of a night that takes over all rows as files, against one without checks."""
    quiet.import_tensorflow()
    quiet.import_beam()
    with tempfile.TemporaryDirectory() as scratch:
        data, model, last = (f"{scratch}/{name}" for name in ("data", "model", "last"))
        bench_export._make_data(f"{scratch}/set", data, _NUM_ROWS, None)
        bench_export.make_model(model, (28, 28, 1), **bench_export._TINY)
        make_embeddings(data, model, last)

        def night(check) -> None:
            shutil.rmtree(f"{scratch}/night", ignore_errors=True)
            checked, manifest_lib.intact_entry = manifest_lib.intact_entry, check
            try:
                make_embeddings(data, model, f"{scratch}/night", reuse_from=last)
            finally:
                manifest_lib.intact_entry = checked

        ours, by_size = median_secs(
            lambda: night(manifest_lib.intact_entry), lambda: night(_of_that_size)
        )
        num_bytes = sum(entry["bytes"] for entry in manifest_lib.manifest_of(last)["files"])
        what = f"{num_bytes / 2**20:,.0f} MiB, {ours - by_size:+.2f} s"
        against = f"the {by_size:.2f} s without checks of bytes"
        report("rows taken over", what, f"{ours / by_size:.2f} ×", against)


if __name__ == "__main__":
    main()
