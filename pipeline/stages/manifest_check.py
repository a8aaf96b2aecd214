"""Checks the values in manifests, jobs, markers and reports before they are used.

A checksum finds damage, but anybody can write a file with a valid checksum. The values become
paths, counts and array shapes, so every value is checked against the range that a stage writes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from pipeline.cli.errors import StageError
from pipeline.stages.contracts import FailedMarker, Job, Manifest, Marker, is_shard
from pipeline.storage import names

# Checks a value, given its key path in the file; raises a _Wrong.
_Rule = Callable[[str, Any], None]
# Largest number of bytes and of records in a file: readers hold a file in memory.
_MOST = 2**40
_MOST_NUMBER = 2**63  # Larger whole numbers fit no int64, and much larger ones no float.
_MOST_PIXELS = 65_535  # Largest height, width and number of channels.
_MOST_LATENTS = 2**16  # As trainer/runs/config.py has it.
# A record's frame in a TFRecord file: its length, and two checksums.
_FRAME_BYTES = 16
# A byte of gzip unpacks to at most this many ("Maximum Compression Factor", zlib's manual).
_MOST_UNPACKED = 1032
_ABSENT = object()


class _Wrong(Exception):
    """Its arguments: the key path, the value, and the expectation."""


def _is(expected: str, is_right: Callable[[Any], Any]) -> _Rule:
    def rule(place: str, value: Any) -> None:
        if not is_right(value):
            raise _Wrong(place, value, expected)

    return rule


def _whole(least: int, most: int) -> _Rule:
    def is_right(value: Any) -> bool:
        return type(value) is int and least <= value <= most  # True is an int, too.

    return _is(f"a whole number from {least} to {most}", is_right)


def _hex(num_digits: int) -> _Rule:
    digits = re.compile(f"[0-9a-f]{{{num_digits}}}")
    return _is(f"{num_digits} hex digits", lambda v: isinstance(v, str) and digits.fullmatch(v))


def _crc32c(value: Any) -> Any:
    return isinstance(value, str) and re.fullmatch("[0-9A-Za-z+/]{6}==", value)


def _object(required: Mapping[str, _Rule], optional: Mapping[str, _Rule] | None = None) -> _Rule:
    """An object with these keys; other keys are ignored."""

    def rule(place: str, value: Any) -> None:
        _OBJECT(place, value)
        for key, value_rule in {**required, **(optional or {})}.items():
            if key in value or key in required:
                value_rule(f"{place}.{key}".lstrip("."), value.get(key, _ABSENT))

    return rule


def _each(value_rule: _Rule) -> _Rule:
    """An object with any keys, whose values follow one rule."""

    def rule(place: str, value: Any) -> None:
        _OBJECT(place, value)
        for key, inner in value.items():
            value_rule(f"{place}[{key!r}]", inner)

    return rule


def _list(item_rule: _Rule, *, least: int = 0, most: float = math.inf) -> _Rule:
    length = ""
    if least:
        length = f" of {least}" if least == most else f" of at least {least}"

    def rule(place: str, value: Any) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise _Wrong(place, value, f"a list{length}")
        for number, item in enumerate(value):
            item_rule(f"{place}[{number}]", item)

    return rule


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _MOST_NUMBER)


_OBJECT = _is("an object", lambda v: isinstance(v, dict))
_TEXT = _is("text", lambda v: isinstance(v, str))
_BOOLEAN = _is("true or false", lambda v: isinstance(v, bool))
_NUMBER = _is("a number", _is_number)
_WORD = _is(
    "a word of letters, digits and underscores", lambda v: isinstance(v, str) and v.isidentifier()
)
_NAME = _is(names.EXPECTED, names.is_below)
_ID = _hex(16)
_CRC32C = _is("base64 of 4 bytes", _crc32c)
_COUNT = _whole(0, _MOST)
_COUNTS = {"read": _COUNT, "written": _COUNT, "quarantined": _COUNT}
_SHAPE = _list(_whole(1, _MOST_PIXELS), least=3, most=3)
_PAIR = _list(_NUMBER, least=2, most=2)
_FILE = {"name": _NAME, "bytes": _COUNT, "sha256": _hex(64)}
_FILES = _list(
    _object(
        _FILE,
        {
            "crc32c": _CRC32C,
            "num_examples": _COUNT,
            "num_quarantined": _COUNT,
            "split": _WORD,
            "of_split": _WORD,
            "instead_of": _list(_NAME),
        },
    )
)
_METRICS = _each(_is("a number or text", lambda v: isinstance(v, str) or _is_number(v)))
_TEST = {"statistic": _NUMBER, "p_value": _NUMBER}
_DRIFT = _object({"mean": _PAIR, "variance": _PAIR, **_TEST})
_REASONS = _list(_TEXT, least=1)
_MANIFESTS = {
    "preprocess": _object(
        {
            "dataset_id": _ID,
            "name": _WORD,
            "image_shape": _SHAPE,
            "class_names": _list(_TEXT),
            "num_shards": _each(_COUNT),
            "splits": _each(_COUNT),
            "records": _object(_COUNTS, {"ignored": _each(_COUNT)}),
            "warnings": _list(_TEXT),
            "files": _FILES,
            "made_from": _object(
                {
                    "name": _WORD,
                    "seed": _NUMBER,
                    "validation_fraction": _NUMBER,
                    "compression": _TEXT,
                }
            ),
        },
        {
            "rejected": _REASONS,
            "drift": _object(
                {
                    "reference": _ID,
                    "splits": _each(
                        _object(
                            {},
                            {
                                "class_shares": _object({"shares": _each(_PAIR), **_TEST}),
                                "brightness": _list(_DRIFT),
                                "contrast": _DRIFT,
                            },
                        )
                    ),
                    "warnings": _list(_TEXT),
                }
            ),
        },
    ),
    "train": _object(
        {
            "model_id": _ID,
            "image_shape": _SHAPE,
            "config": _object({"latent_dim": _whole(1, _MOST_LATENTS)}),
            "step": _COUNT,
            "trained_steps": _COUNT,
            "metrics": _each(_METRICS),
            "files": _FILES,
            "made_from": _OBJECT,
        },
        {"class_names": _list(_TEXT)},
    ),
    "export": _object(
        {
            "export_id": _ID,
            "dataset_id": _is("text or null", lambda v: v is None or isinstance(v, str)),
            "model_id": _ID,
            "records": _object(_COUNTS),
            "metrics": _each(_NUMBER),
            "shards": _each(
                _object(
                    {"made_of": _TEXT, "files": _list(_NAME, least=1), **_COUNTS},
                    {"outside_classes": _COUNT},
                )
            ),
            "files": _FILES,
            "made_from": _object({"name": _WORD, "split": _list(_WORD)}, {"fingerprint": _TEXT}),
        },
        {
            "class_names": _list(_TEXT),
            "rejected": _REASONS,
            "drift": _object(
                {"reference": _TEXT, "same_model": _BOOLEAN, "warnings": _list(_TEXT)},
                {"latents": _list(_DRIFT), "reconstruction_loss": _DRIFT},
            ),
        },
    ),
}
_JOB = _object(
    {"made_from": _OBJECT, "names": _list(_NAME)}, {"reuses": _TEXT, "drops": _list(_NAME)}
)
_JOBS = {"preprocess": _JOB, "export": _JOB}
_FAILED = _object({"failed": _TEXT})
_DONE = _object({"entries": _FILES, "secs": _each(_NUMBER)})
_REPORT = _object({"export_id": _ID, "files": _FILES})
# report.json while the report's files are written.
_BEGUN_REPORT = _object({"export_id": _TEXT, "files": _list(_object({"name": _NAME}))})


def manifest(path: str, value: Any) -> Manifest:
    """Checks a manifest, and refuses values that no stage writes.

    Args:
      path: path of the file, for the message.
      value: content of the file.

    Returns:
      The content as a manifest of the stage that the content names.

    Raises:
      StageError: names the key path, the value, and the expectation.
    """

    def rule(place: str, content: Any) -> None:
        _of_stage(_MANIFESTS)(place, content)
        _FITTING.get(content["stage"], _OBJECT)(place, content)

    _check(path, rule, value)
    return cast(Manifest, value)


def job(path: str, value: Any) -> Job:
    """As `manifest`, for job.json."""
    _check(path, _of_stage(_JOBS), value)
    return cast(Job, value)


def marker(path: str, value: Mapping[str, Any]) -> Marker | FailedMarker:
    """As `manifest`, for a task's marker."""
    _check(path, _FAILED if "failed" in value else _DONE, value)
    return cast(Marker | FailedMarker, value)


def report(path: str, value: Mapping[str, Any]) -> None:
    """As `manifest`, for report.json."""
    _check(path, _REPORT if value.get("export_id") else _BEGUN_REPORT, value)


def _check(path: str, rule: _Rule, value: Any) -> None:
    try:
        rule("", value)
    except _Wrong as wrong:
        place, actual, expected = wrong.args
        text = repr(actual)
        text = text if len(text) <= 60 else f"{text[:60]}…"
        fault = f"has no {place}" if actual is _ABSENT else f"{place} is {text}"
        raise StageError(
            f"{path}: {fault}; expected {expected}: this program never writes such a value, so "
            "make the directory again with --overwrite, or name another directory"
        ) from None


def _of_stage(rules: Mapping[str, _Rule]) -> _Rule:
    """The rule for the stage that the file names."""
    stage = _is(f"one of {', '.join(rules)}", lambda v: isinstance(v, str) and v in rules)

    def rule(place: str, value: Any) -> None:
        _object({"stage": stage})(place, value)
        rules[value["stage"]](place, value)

    return rule


def _data_set_fits(_: str, value: Any) -> None:
    """Checks that the parts of a data set's manifest fit each other, as readers assume."""
    for split in value["splits"]:
        _WORD("a name in splits", split)
        _COUNT(f"num_shards.{split}", value["num_shards"].get(split, _ABSENT))
    for key, made_from in value["made_from"].items():
        if key == "source" or key.startswith("appended-"):
            _OBJECT(f"made_from.{key}", made_from)
    least = _FRAME_BYTES + math.prod(value["image_shape"])
    for number, entry in enumerate(value["files"]):
        if is_shard(entry):
            place = f"files[{number}]"
            if entry["split"] not in value["splits"]:
                raise _Wrong(f"{place}.split", entry["split"], "a name in splits")
            unpacked = entry["bytes"] * (_MOST_UNPACKED if entry["name"].endswith(".gz") else 1)
            count, most = entry.get("num_examples", _ABSENT), unpacked // least
            if count is _ABSENT or count > most:
                expected = f"at most {most} records of such images in {entry['bytes']} bytes"
                raise _Wrong(f"{place}.num_examples", count, expected)


def _export_fits(_: str, value: Any) -> None:
    """Checks that the parts of an export's manifest fit each other."""
    listed = {entry["name"] for entry in value["files"]}
    for task, shard in value["shards"].items():
        if not listed.issuperset(shard["files"]):
            raise _Wrong(f"shards[{task!r}].files", shard["files"], "names that files lists")
    if value["dataset_id"] is None:
        _TEXT("made_from.fingerprint", value["made_from"].get("fingerprint", _ABSENT))


_FITTING = {"preprocess": _data_set_fits, "export": _export_fits}
