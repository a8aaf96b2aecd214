"""Damages one file of a finished directory, as a power cut or bit rot may, and runs commands on it.

    python -m tests.faults.losses [--quick] [--messages] [NAME ...]

NAME is a subject, such as "plain set"; by default all of them. Each command runs on a copy of its
own of the damaged directory. What it leaves is compared with what it leaves of an undamaged copy:

same bytes   it ended well, and nothing differs
error        it refused with a StageError or a UsageError
os error     it ended with an OSError, which commands show in one line too
silent       it ended well, and the file is still damaged, or rows of the new export differ
other bytes  it ended well, and other bytes differ
traceback    it ended with any other exception: a defect
named        verify names the file
not named    verify finds the directory whole, or names other files only
refuses      verify does not take an undamaged directory either
"""

import argparse
import collections
import contextlib
import io
import os
import pathlib
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from absl import flags
from absl.testing import flagsaver
from pyarrow import parquet

from pipeline import verify
from pipeline.cli import quiet
from pipeline.cli.errors import StageError
from pipeline.stages import manifest as manifest_lib
from tests.conftest import make_embeddings, make_folder_set, make_shards, outputs_of, smoke_config


def zero_page(data: bytes) -> bytes:
    """Zeros in place of a page in the middle; of less than two pages, of the middle third."""
    start, end = len(data) // 3, 2 * len(data) // 3
    if len(data) >= 2 * 4096:
        start = len(data) // 2 // 4096 * 4096
        end = start + 4096
    return data[:start] + bytes(end - start) + data[end:]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "page": zero_page,
    "gone": lambda data: None,
}
QUICK, SLOW = ("zeros", "gone"), ("model", "workdir")  # Damages, and subjects, of --quick.


class Subject(NamedTuple):
    """A finished directory, at `out` in the scratch directory; a command writes it, or `next`."""

    make: Callable[[], object]
    files: str  # Pattern of the names of the files to damage.
    commands: Mapping[str, Callable[[], object]]
    verified: str = "out"  # What verify looks at.


class Outcome(NamedTuple):
    category: str  # "" of a command that ended well.
    note: str = ""  # The error's message, or what differs.


def attempt(run: Callable[[], object]) -> tuple[Outcome, str]:
    """Runs a command; returns its outcome, and what it has printed."""
    outcome, printed = Outcome(""), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            run()
        except StageError as error:
            outcome = Outcome("error", str(error))
        except OSError as error:
            outcome = Outcome("os error", str(error))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if re.search(r"/(pipeline|trainer|tests)/", f.filename)][-1]
            where = f"{os.path.basename(ours.filename)}, {ours.name}"
            outcome = Outcome("traceback", f"{type(error).__name__} in {where}: {error}")
    return outcome, printed.getvalue()


def must(run: Callable[[], object]) -> None:
    outcome, printed = attempt(run)
    assert not outcome.category, f"undamaged: {outcome}\n{printed}"


def contents_of(directory: pathlib.Path) -> dict[str, object]:
    """Name -> what has to be the same after a command.

    A SavedModel's bytes differ from run to run: "model" is its id, if its files are as listed.
    """
    export, paths = directory / "export", sorted(directory.glob("embeddings/*.parquet"))
    found: dict[str, object] = {
        path: data
        for path, data in outputs_of(directory).items()
        if not path.startswith(("tensorboard/", "timings", "export/"))
    }
    for path in (directory / "changes.parquet", export / "weights.npz"):
        found |= {path.name: path.read_bytes()} if path.exists() else {}
    try:
        found["rows"] = [parquet.read_table(path).to_pylist() for path in paths]
    except (ValueError, OSError) as error:  # pyarrow's.
        found["rows"] = str(error)
    try:
        manifest = manifest_lib.manifest_of(str(export))
        for entry in manifest["files"] if manifest else ():
            manifest_lib.read_file(str(export), entry)
        found["model"] = manifest and manifest["model_id"]
    except StageError as error:
        found["model"] = str(error)
    return found


class Trial:
    """What commands do with damaged copies of a subject."""

    def __init__(self, subject: Subject, scratch: pathlib.Path):
        self._out, self._next, self._kept = (scratch / name for name in ("out", "next", "kept"))
        for path in (self._out, self._kept):
            shutil.rmtree(path, ignore_errors=True)
        must(subject.make)
        self._out.rename(self._kept)
        paths = (str(p.relative_to(self._kept)) for p in self._kept.rglob("*") if p.is_file())
        paths = (path for path in paths if re.match(subject.files, path))
        self.files = sorted(p for p in paths if not p.endswith((".lock", "timings.json")))
        verified = str(scratch / subject.verified)
        self.commands = {**subject.commands, "verify": lambda: verify.run([verified])}
        if "repair" in flags.FLAGS:
            self.commands["repair"] = flagsaver.flagsaver(repair=True)(self.commands["verify"])
        self._expected, self._refused = {}, set()
        kept = contents_of(self._kept)
        for name, command in self.commands.items():
            self._copy(self.files[0], self.read(self.files[0]))
            if name not in ("verify", "repair"):
                must(command)
            elif attempt(command)[0].category:
                self._refused.add(name)
            self._expected[name] = contents_of(self._result())
            assert name.startswith(("next", "export")) or self._expected[name] == kept, name

    def read(self, path: str) -> bytes:
        return (self._kept / path).read_bytes()

    def _result(self) -> pathlib.Path:
        return self._next if self._next.exists() else self._out

    def _copy(self, path: str, left: bytes | None) -> None:
        """Makes a copy, of one file of which these bytes are left; None: no file."""
        for directory in (self._out, self._next):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self._kept, self._out)
        (self._out / path).unlink()
        if left is not None:
            (self._out / path).write_bytes(left)
            shutil.copystat(self._kept / path, self._out / path)

    def outcome(self, name: str, path: str, left: bytes | None) -> Outcome:
        """What a command does with a damaged copy."""
        if name in self._refused:
            return Outcome("refuses")
        self._copy(path, left)
        outcome, printed = attempt(self.commands[name])
        if name == "verify" and outcome.category in ("", "error"):
            pattern = rf"{re.escape(os.path.basename(path))}(?!\.?\w)"
            is_named = re.search(pattern, printed + outcome.note)
            return Outcome("named" if is_named else "not named", outcome.note or printed)
        if outcome.category:
            return outcome
        result, expected = self._result(), self._expected[name]
        found, file = contents_of(result), self._out / path
        differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        if not differing:
            return Outcome("same bytes")
        is_damaged = (file.read_bytes() if file.exists() else None) == left
        is_silent = is_damaged if result == self._out else "rows" in differing
        return Outcome("silent" if is_silent else "other bytes", f"differs: {', '.join(differing)}")


def make_subjects(place: pathlib.Path) -> dict[str, Subject]:
    """All subjects; `place` gets their sources, and what they are made from."""
    from PIL import Image

    from trainer.runs import train

    out, next_, data, grown, run = (place / n for n in ("out", "next", "data", "grown", "run"))
    first = make_folder_set(place / "first", num_train=12, num_test=6, size=(4, 4))
    # Its images for training are those of the first source.
    second = make_folder_set(place / "second", num_train=12, num_test=4, size=(4, 4))
    broken = min((first / "train").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:20])

    def shards(source: pathlib.Path = first, directory: pathlib.Path = out, **settings) -> None:
        settings |= {"num_shards": 1, "validation_fraction": 0.0, "max_quarantined": "50%"}
        for path in [source, *source.rglob("*")]:
            os.utime(path, (1e9, 1e9))  # As of some time ago: what is remembered of it is trusted.
        make_shards(f"folder:{source}", directory, **settings)

    def append(directory: pathlib.Path = out, **settings) -> None:
        shards(second, directory, append=True, id_prefix="more-", **settings)

    def append_grown() -> None:
        """The first source has one more image."""
        path = broken.parent / "one more.png"
        Image.linear_gradient("L").resize((4, 4)).save(path)
        try:
            shards(append=True)
        finally:
            path.unlink()

    def export(directory: pathlib.Path = out, of: pathlib.Path = data, **settings) -> None:
        model = settings.pop("model", run / "export")
        make_embeddings(of, model, directory, split="test,train", **settings)

    def fit(workdir: pathlib.Path = out, **settings) -> None:
        train.train(smoke_config(data), workdir=str(workdir), **settings)

    def make_appended(directory: pathlib.Path = out) -> None:
        shards(first, directory)
        append(directory)

    must(lambda: shards(first, data))
    must(lambda: make_appended(grown))
    must(lambda: fit(run))
    to_appended = {
        "rerun": append,
        "source again": lambda: shards(append=True),
        "next append": append_grown,
        "overwrite": lambda: append(overwrite=True),
    }
    to_runs = {"rerun": fit, "overwrite": lambda: fit(overwrite=True)}
    return {
        "plain set": Subject(
            shards,
            r"(?!index/source-)",
            {
                "rerun": shards,
                "next append": append,
                "export of it": lambda: export(next_, out),
                "overwrite": lambda: shards(overwrite=True),
            },
        ),
        "appended set": Subject(make_appended, r"(?!index/source-)", to_appended),
        "memories of sources": Subject(make_appended, r"index/source-", to_appended),
        "export": Subject(
            export,
            r"",
            {
                "rerun": export,
                "next night": lambda: export(next_, grown, reuse_from=out),
                "overwrite": lambda: export(overwrite=True),
            },
        ),
        "model": Subject(
            fit,
            r"export/",
            {**to_runs, "export with it": lambda: export(next_, model=out / "export")},
            verified="out/export",
        ),
        "workdir": Subject(fit, r"config\.|metrics\.|checkpoints/", to_runs),
    }


def show(name: str, trial: Trial, damages: Iterable[str], *, messages: bool) -> None:
    """Prints what each command does with each damage, and counts."""
    rows: dict[tuple[str, ...], list[str]] = {}
    columns = list(trial.commands)
    counts = {column: collections.Counter[str]() for column in columns}
    notes = collections.Counter[tuple[str, ...]]()
    for path in trial.files:
        seen: set[bytes | None] = {trial.read(path)}
        for damage in damages:
            left = DAMAGES[damage](trial.read(path))
            if left in seen:
                continue  # As an empty file that is cut.
            seen.add(left)
            outcomes = [trial.outcome(column, path, left) for column in columns]
            rows.setdefault((path, *(outcome.category for outcome in outcomes)), []).append(damage)
            for column, (category, note) in zip(columns, outcomes, strict=True):
                counts[column][category] += 1
                text = re.sub(r"\S+/(out|next)\b", r"\1", note).replace(path, "FILE")
                text = re.sub(r"\b[0-9a-f]{12,}\b", "HASH", text)
                notes[column, category, re.sub(r"\b\d[\d,]*\b", "N", text).strip()] += 1
    width = max(map(len, trial.files))
    print(f"\n{name}\n{'file':<{width}}  {'damages':<31}", *(f"{c:<14}" for c in columns))
    for (path, *cells), kinds in rows.items():
        print(f"{path:<{width}}  {', '.join(kinds):<31}", *(f"{cell:<14}" for cell in cells))
    for column, counter in counts.items():
        text = ", ".join(f"{count} {category}" for category, count in sorted(counter.items()))
        print(f"{name}: {column}: {text}")
    for (column, category, text), count in sorted(notes.items()) if messages else ():
        if text:
            print(f"  {count} × {column}, {category}: {text}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer damages where commands train")
    parser.add_argument("--messages", action="store_true", help="the distinct messages, too")
    arguments = parser.parse_args()
    os.environ.setdefault("VAE_NOSYNC", "1")
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", GRPC_VERBOSITY="ERROR")
    quiet.import_beam()
    quiet.import_tensorflow()
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # Commands trace their functions again and again.
    flags.FLAGS(["losses"])
    with tempfile.TemporaryDirectory() as directory:
        for name, subject in make_subjects(pathlib.Path(directory)).items():
            if arguments.names and name not in arguments.names:
                continue
            started = time.monotonic()
            trial = Trial(subject, pathlib.Path(directory))
            damages = QUICK if arguments.quick and name in SLOW else DAMAGES
            show(name, trial, damages, messages=arguments.messages)
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
