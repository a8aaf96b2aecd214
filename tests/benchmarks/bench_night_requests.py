"""How many requests a nightly export sends to an object store.

    python -m tests.benchmarks.bench_night_requests

Shards, model and exports are on the store of the tests. 20 shards of 100 records are there in the
first night. Then come a night with nothing new, one with 1,000 records in 4 new shards, and one
with another model, which computes all.
"""

import os
import pathlib
import tempfile

import numpy as np

from tests.conftest import run_command
from tests.storage import object_stores

_NUM_RECORDS, _NUM_NEW = 2_000, 1_000


def _save(path: pathlib.Path, first: int, num_records: int) -> str:
    images = np.random.default_rng(first).integers(0, 256, (num_records, 28, 28), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(num_records) % 10)
    return f"npz:{path}"


def main() -> None:
    """Prints a table."""
    place = f"gs://{object_stores.BUCKET}"
    data = f"{place}/data"
    common = [f"--output_dir={data}", "--name=images", "--validation_fraction=0"]
    with (
        object_stores.running(object_stores.find_server()) as store,
        tempfile.TemporaryDirectory() as temporary,
    ):
        os.environ["STORAGE_EMULATOR_HOST"] = store.url
        scratch = pathlib.Path(temporary)
        source = _save(scratch / "first.npz", 0, _NUM_RECORDS)
        run_command("pipeline.preprocess", f"--source={source}", "--num_shards=20", *common)
        for model in (1, 2):
            settings = [f"--config.data_dir={data}", f"--config.seed={model}"]
            settings += ["--config.num_epochs=1", f"--workdir={place}/run{model}"]
            run_command("trainer.main", "--config=configs/mnist.py", *settings)
        print("| night | requests | of them writing |\n|---|---|---|")

        def night(number: int, event: str, model: int = 1) -> None:
            methods: list[bool] = []

            def count(request: object_stores.Request) -> None:
                methods.append(request.changes)

            flags = [f"--data_dir={data}", f"--model_dir={place}/run{model}/export"]
            flags += [
                f"--output_dir={place}/exports/dt={number}",
                f"--latest={place}/exports/latest",
            ]
            flags += ["--split=train", "--noreport"]
            with store.deciding(count):
                run_command("pipeline.export", *flags)
            print(f"| {event} | {len(methods):,} | {sum(methods):,} |", flush=True)

        night(1, "the first, 20 shards")
        night(2, "nothing new")
        source = _save(scratch / "more.npz", 1, _NUM_NEW)
        flags = ["--num_shards=4", "--id_prefix=more-", "--append"]
        run_command("pipeline.preprocess", f"--source={source}", *flags, *common)
        night(3, "4 new shards")
        night(4, "another model", model=2)


if __name__ == "__main__":
    main()
