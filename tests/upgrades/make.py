"""Makes the outputs by which later versions show that they still read those of this one.

    python -m tests.upgrades.make DIR

DIR gets, of images of 12×8 pixels: the sources `first` and `second`, a data set of the first
(`set`), the same grown by the second (`appended`), a run over `set` that was stopped within an
epoch (`stopped_run`), a finished one with its model (`finished_run`), an export of `appended`
(`export`), and a data set, an append and an export that were killed half-way (`half_set`,
`half_append`, `half_export`). test_upgrades.py works with all of them.
"""

import pathlib
import shutil
import signal
import sys

from tests.conftest import die_at_file, make_idx_set, run_command
from tests.faults import interrupting

# Flags of each stage; test_upgrades.py passes the same.
PREPROCESS = ("--name=blobs", "--num_shards=3", "--validation_fraction=0.2")
SECOND = ("--append", "--id_prefix=second-")
TRAIN = (
    "--config=configs/smoke.py",
    "--config.batch_size=27",
    "--config.num_epochs=3",
    "--config.early_stopping_patience=3",
)
EXPORT = ("--split=validation,test", "--noreport")


def make(directory: pathlib.Path) -> None:
    """Runs the commands and kills those that are to be unfinished."""
    first = make_idx_set(directory / "first", suffix=".gz", num_train=120, num_test=30)
    second = make_idx_set(directory / "second", suffix=".gz", num_train=40, num_test=20)
    of_first = ("pipeline.preprocess", f"--source=idx:{first}", *PREPROCESS)
    of_second = ("pipeline.preprocess", f"--source=idx:{second}", *PREPROCESS, *SECOND)

    run_command(*of_first, f"--output_dir={directory / 'set'}")
    die_at_file(6, *of_first, f"--output_dir={directory / 'half_set'}")
    for name in ("appended", "half_append"):
        shutil.copytree(directory / "set", directory / name)
    run_command(*of_second, f"--output_dir={directory / 'appended'}")
    half = f"--output_dir={directory / 'half_append'}"
    die_at_file("test.tfrecord-00003", *of_second, half)

    train = (*TRAIN, f"--config.data_dir={directory / 'set'}")
    status = interrupting.train(
        [*train, f"--workdir={directory / 'stopped_run'}"],
        log=directory / "log",
        at=interrupting.At("training", 3, signal.SIGTERM),
    )
    assert status == 75, (directory / "log").read_text()
    (directory / "log").unlink()
    run_command("trainer.main", *train, f"--workdir={directory / 'finished_run'}")
    for run in ("stopped_run", "finished_run"):  # Nothing reads it back.
        shutil.rmtree(directory / run / "tensorboard")

    model = f"--model_dir={directory / 'finished_run' / 'export'}"
    export = ("pipeline.export", model, f"--data_dir={directory / 'appended'}", *EXPORT)
    run_command(*export, f"--output_dir={directory / 'export'}")
    die_at_file("test-00001", *export, f"--output_dir={directory / 'half_export'}")


if __name__ == "__main__":
    make(pathlib.Path(sys.argv[1]))
