"""What waiting for an object store costs a stage: one request at a time, and several.

    python -m tests.benchmarks.bench_requests

The store is that of the tests, behind a proxy that answers each request 30 ms late.
"""

import os
import time

from pipeline.stages import manifest as manifest_lib
from pipeline.stages import tasks
from pipeline.storage import files
from tests.storage import object_stores

_DELAY_SECS = 0.03
_NUM_FILES = 300


def main() -> None:
    """Prints seconds for reading markers, and for copies by the store."""
    with object_stores.running(object_stores.find_server()) as store:
        os.environ["STORAGE_EMULATOR_HOST"] = store.url
        place = f"gs://{object_stores.BUCKET}/out"
        names = [f"{number:05d}" for number in range(_NUM_FILES)]
        for name in names:
            store.put(f"out/.progress/{name}.json", manifest_lib.sealed_json({"name": name}))
        ask = store.ask

        def ask_late(*args):
            time.sleep(_DELAY_SECS)
            return ask(*args)

        def link(name: str) -> None:
            files.link(files.join(place, "waiting", name), files.join(place, name))

        for at_once in (1, files._REQUESTS_AT_ONCE):
            for name in names:
                store.put(f"out/waiting/{name}", name.encode())
            files._REQUESTS_AT_ONCE, store.ask = at_once, ask_late
            started = time.perf_counter()
            tasks.Tasks(place).markers(names)
            read = time.perf_counter()
            files.each(place, link, names)
            linked = time.perf_counter()
            store.ask = ask
            print(
                f"{at_once:2} at a time: {_NUM_FILES} markers read in {read - started:.1f} s, "
                f"{_NUM_FILES} files copied in {linked - read:.1f} s"
            )


if __name__ == "__main__":
    main()
