"""Trains a run and then exports, in one process whose environment chooses the arithmetic.

    python -m tests.machine.train_and_export DATA_DIR WORKDIR FLAG...

The flags are those of pipeline.export.
"""

import runpy
import sys

from pipeline.cli import quiet
from tests.conftest import smoke_config


def main() -> None:
    quiet.import_tensorflow()
    from trainer.runs import train

    data_dir, workdir = sys.argv[1:3]
    train.train(smoke_config(data_dir, num_epochs=3), workdir=workdir)
    sys.argv = ["pipeline.export", *sys.argv[3:]]
    runpy.run_module("pipeline.export", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
