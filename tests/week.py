"""Nine nightly exports over a growing data set, with typical failures.

    python -m tests.week --source=idx:DIR --workdir=DIR

Seven days append 1,000 records of an image set and export. In the third night the export is
killed half-way, in the fifth a shard is damaged, in the seventh there is a new model. Then a gate
rejects an export, `latest` is moved back, and the next night moves it on. This prints what each
export computed, which one `latest` names, and checks that the last export has the same bytes as a
single export of the whole set. Every step runs one of the project's commands in its own process.
"""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
from absl import app, flags

from tests.conftest import die_at_file, outputs_of, run_command

_SOURCE = flags.DEFINE_string("source", "sample", "Image set, as in pipeline.preprocess.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory to work in; emptied first.", required=True
)

_NUM_DAYS, _RECORDS_A_DAY, _SHARDS_A_DAY = 7, 1_000, 4
_MAX_TRAINING = 10_000
# Files that the third night's export opens up to the kill: job.json, markers of eight linked
# shards, rows, contact sheet, note and marker of the first new shard, then files of the second.
_HALF_WAY = 1 + 8 + 4 + 3


def _save(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> str:
    np.savez(path, x_train=images, y_train=labels)
    return f"npz:{path}"


def _preprocess(source: str, directory: pathlib.Path, *flags_: str) -> None:
    run_command(
        "pipeline.preprocess",
        f"--source={source}",
        f"--output_dir={directory}",
        "--name=images",
        "--validation_fraction=0",
        *flags_,
    )


def _train(data: pathlib.Path, workdir: pathlib.Path, *, num_epochs: int) -> pathlib.Path:
    run_command(
        "trainer.main",
        "--config=configs/mnist.py",
        f"--config.data_dir={data}",
        f"--config.num_epochs={num_epochs}",
        f"--workdir={workdir}",
    )
    return workdir / "export"


class Week:
    """The directories of a week, and the printed table."""

    def __init__(self, source: str, workdir: pathlib.Path):
        """Prepares training data, two models, and the records of seven days."""
        from pipeline.sources import conversion

        self._data, self._out, self._workdir = workdir / "data", workdir / "exports", workdir
        self.latest = self._out / "latest"
        opened = conversion.open_converted(conversion.SourceSpec(source))
        num_appended = _NUM_DAYS * _RECORDS_A_DAY
        num_training = min(_MAX_TRAINING, opened.num_records - num_appended)
        training = opened.read(np.arange(num_training))
        _preprocess(_save(workdir / "t.npz", training.images, training.labels), workdir / "t")
        self._models = [
            _train(workdir / "t", workdir / f"run{number}", num_epochs=number) for number in (1, 2)
        ]
        first = opened.num_records - num_appended
        self._records = opened.read(np.arange(first, opened.num_records))
        self._line("night", "what happened", "read", "computed", "reused", "quarantined", "latest")

    def _line(self, *cells: object) -> None:
        print("| " + " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in cells) + " |")
        if cells[0] == "night":
            print("|" + "---|" * len(cells))
        sys.stdout.flush()

    def append(self, day: int) -> None:
        """Adds the day's records to the set."""
        first = (day - 1) * _RECORDS_A_DAY
        day_slice = slice(first, first + _RECORDS_A_DAY)
        images, labels = self._records.images[day_slice], self._records.labels[day_slice]
        source = _save(self._workdir / f"day{day}.npz", images, labels)
        flags_ = [f"--num_shards={_SHARDS_A_DAY}", f"--id_prefix=day{day}-"]
        if day > 1:
            flags_.append("--append")
        _preprocess(source, self._data, *flags_)

    def directory(self, night: int) -> pathlib.Path:
        """The export of a night."""
        return self._out / f"dt={night}"

    def flags(self, night: int, *, model: int = 0) -> list[str]:
        """Flags of the nightly export."""
        return [
            *self._flags(self.directory(night), model=model),
            f"--latest={self.latest}",
        ]

    def _flags(self, out: pathlib.Path, *, model: int) -> list[str]:
        return [
            f"--data_dir={self._data}",
            f"--model_dir={self._models[model]}",
            f"--output_dir={out}",
            "--split=train",
            "--on_corrupt=quarantine",
        ]

    def export(self, night: int, event: str, *, model: int = 0, require: str = "") -> None:
        """Exports and adds the night to the table."""
        flags_ = self.flags(night, model=model) + ([f"--require={require}"] if require else [])
        done = run_command("pipeline.export", *flags_, check=not require)
        assert done.returncode == bool(require), done.stderr
        out = self.directory(night)
        manifest = json.loads((out / "manifest.json").read_text())
        assert ("rejected" in manifest) == bool(require)
        done = json.loads((out / "timings.json").read_text())["done"].values()
        records = manifest["records"]
        assert records["read"] == records["written"] + records["quarantined"]
        computed = f"{sum(counts['computed'] for counts in done):,}"
        num_earlier = sum(counts["computed"] for counts in done if counts["earlier_try"])
        if num_earlier:
            computed += f" ({num_earlier:,} of them before the kill)"
        reused = sum(counts["reused"] for counts in done)
        self._line(
            night,
            event,
            *(records["read"], computed, reused, records["quarantined"]),
            os.readlink(self.latest),
        )

    def move_back(self, night: int) -> None:
        """Moves `latest` to an earlier night."""
        run_command("pipeline.latest", self.latest, f"--to={self.directory(night)}")
        self._line("", f"moved back to night {night}", "", "", "", "", os.readlink(self.latest))

    def newest_shard(self) -> pathlib.Path:
        """The last shard of the set."""
        return sorted(self._data.glob("images-train.tfrecord-*"))[-1]

    def check(self, *, model: int) -> None:
        """Raises an AssertionError unless a fresh export has the same bytes."""
        fresh = self._workdir / "fresh"
        run_command("pipeline.export", *self._flags(fresh, model=model))
        assert outputs_of(fresh) == outputs_of(self.latest.resolve())
        print("The same bytes as an export of the whole set at once, the report included.")


def main(_) -> None:
    """Runs the week."""
    workdir = pathlib.Path(os.path.abspath(_WORKDIR.value))
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    week = Week(_SOURCE.value, workdir)
    for day in (1, 2):
        week.append(day)
        week.export(day, "1,000 records appended" if day > 1 else "1,000 records")
    week.append(3)
    die_at_file(_HALF_WAY, "pipeline.export", *week.flags(3))
    week.export(3, "killed half-way, started again")
    week.append(4)
    week.export(4, "1,000 records appended")
    week.append(5)
    shard = week.newest_shard()
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-100] + bytes([intact[-100] ^ 1]) + intact[-99:])
    week.export(5, "a bit of a new shard flipped")
    shard.write_bytes(intact)
    week.append(6)
    week.export(6, "that shard restored")
    week.append(7)
    week.export(7, "a new model", model=1)
    week.export(8, "the gate rejects it", require="elbo>0")
    week.move_back(6)
    week.export(9, "the gate lets it through", model=1)
    week.check(model=1)


if __name__ == "__main__":
    app.run(main)
