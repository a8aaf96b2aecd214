"""Compares the records that a job writes with those of another data set: --reference."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.datasets import reader
from pipeline.stages import drift
from pipeline.stages import manifest as manifest_lib
from pipeline.stages.contracts import FileEntry, is_shard

STATISTICS = "statistics.json"
# Images of a split in the sample that is compared, and the most bytes of their pixels.
_MAX_IMAGES = 1000
_MAX_BYTES = 128 << 20
# Classes whose shares are listed: those that differ most.
_MAX_CLASSES = 20
_UNLABELLED = "without a label"
# Rarer classes are taken together for the chi-square test, which holds for expected counts of at
# least 5: Cochran (1954), "Some Methods for Strengthening the Common χ² Tests".
_MIN_EXPECTED = 5


class _Split(NamedTuple):
    counts: Mapping[str, int]  # Class -> number of records.
    brightness: np.ndarray  # float64 (n, C): mean of each channel of an image.
    contrast: np.ndarray  # float64 (n,): standard deviation of all values of an image.


class Profile(NamedTuple):
    """What is compared of some records."""

    dataset_id: str
    image_shape: tuple[int, ...]
    splits: Mapping[str, _Split]  # Those with records.


def profile(
    directory: str,
    shards: Sequence[FileEntry],
    splits: Mapping[str, Mapping[str, Any]],
    image_shape: Sequence[int],
    dataset_id: str = "",
) -> Profile:
    """The profile of the records in some shards of a data set.

    Args:
      directory: the data set's.
      shards: the shards' entries.
      splits: split -> `Statistics.summary` of these records.
      image_shape: (H, W, C).
      dataset_id: the data set's, if it has one already.

    Raises:
      StageError: a shard has no readable record.
    """
    profiles = {}
    for split, summary in splits.items():
        if summary["num_examples"]:
            counts = {**summary["num_per_class"], **summary["num_outside_classes"]}
            counts[_UNLABELLED] = summary.get("num_unlabelled", 0)
            split_shards = [shard for shard in shards if shard["split"] == split]
            images = _sample(directory, split_shards, image_shape)
            profiles[split] = _Split(counts, *images)
    return Profile(dataset_id, tuple(image_shape), profiles)


def read(directory: str, manifest: Mapping[str, Any]) -> Profile:
    """The profile of all records of a finished data set.

    Raises:
      StageError: a file of the set is missing or damaged.
    """
    files = manifest["files"]
    return profile(
        directory,
        list(filter(is_shard, files)),
        summaries(directory, files),
        manifest["image_shape"],
        manifest["dataset_id"],
    )


def summaries(directory: str, files: Sequence[FileEntry]) -> dict[str, dict[str, Any]]:
    """Split -> `Statistics.summary`, from the statistics.json of a finished data set.

    Raises:
      StageError: the file is missing or damaged.
    """
    [entry] = [entry for entry in files if entry["name"] == STATISTICS]
    splits: dict[str, dict[str, Any]] = json.loads(manifest_lib.read_file(directory, entry))[
        "splits"
    ]
    return splits


def _sample(
    directory: str, shards: Sequence[FileEntry], image_shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness and contrast of the first images of each shard, in proportion to its size.

    This is a fair sample, because the order within a shard is a hash of the ids.
    """
    total = sum(shard["num_examples"] for shard in shards)
    most = min(total, _MAX_IMAGES, max(1, _MAX_BYTES // math.prod(image_shape)))
    brightness, contrast = [], []
    for shard in shards:
        count = -(-shard["num_examples"] * most // total)
        records = reader.read_head(directory, shard, count, tuple(image_shape))
        if count and not records:
            raise StageError(
                f"{directory}/{shard['name']}: has no readable record at its beginning; expected "
                f"{shard['num_examples']:,} records: find the faults with python -m pipeline.verify"
            )
        for record in records:
            values = np.frombuffer(record.image, np.uint8).reshape(-1, image_shape[2])
            brightness.append(values.mean(axis=0))
            contrast.append(values.std())
    return np.array(brightness), np.array(contrast)


def compare(current: Profile, reference: Profile) -> dict[str, Any]:
    """Compares records with those of the reference, split by split.

    Returns:
      JSON values. "reference": the reference's dataset_id. "splits": split -> {"class_shares":
      {"shares": class -> [reference, current], of the classes that differ most, "statistic": total
      variation, "p_value" of a chi-square test}, "brightness": a list, channel by channel, and
      "contrast", with {"mean", "variance": [reference, current], "statistic":
      Kolmogorov-Smirnov, "p_value"}}, of the splits that both have; images with other channels are
      left out. "warnings": a sentence for each quantity that has drifted.
    """
    warnings, splits = [], {}
    if current.image_shape != reference.image_shape:
        shape, earlier = ("×".join(map(str, side.image_shape)) for side in (current, reference))
        warnings.append(f"the images have another shape: {earlier} in the reference, {shape} here")
    common = [split for split in current.splits if split in reference.splits]
    if not common:
        warnings.append("no split has records both in the reference and here")
    for split in common:
        after, before = current.splits[split], reference.splits[split]
        result: dict[str, Any] = {}
        if shares := _class_shares(before.counts, after.counts):
            result["class_shares"] = shares
        if current.image_shape[2] == reference.image_shape[2]:
            channels = zip(before.brightness.T, after.brightness.T, strict=True)
            result["brightness"] = [_numbers(*channel) for channel in channels]
            result["contrast"] = _numbers(before.contrast, after.contrast)
        splits[split] = result
    named = [(f"{s}: {name}", test) for s, part in splits.items() for name, test in tests(part)]
    for name, test in named:
        if drift.has_drifted(test, len(named)):
            warnings.append((_class_warning if "shares" in test else drift.warning)(name, test))
    return {"reference": reference.dataset_id, "splits": splits, "warnings": warnings}


def tests(part: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, test) of all that was compared of a split, from a result of `compare`."""
    brightness = part.get("brightness", ())
    named = [(f"brightness of channel {i}", test) for i, test in enumerate(brightness)]
    if len(named) == 1:
        named = [("brightness", *brightness)]
    others = {"contrast": part.get("contrast"), "class shares": part.get("class_shares")}
    return named + [(name, test) for name, test in others.items() if test]


def observe(comparison: Mapping[str, Any]) -> None:
    """Sets the metrics of a comparison."""
    parts = comparison["splits"].values()
    drift.observe(
        {
            "class_shares": [part["class_shares"] for part in parts if "class_shares" in part],
            "brightness": [test for part in parts for test in part.get("brightness", ())],
            "contrast": [part["contrast"] for part in parts if "contrast" in part],
        },
        comparison["warnings"],
    )


def _numbers(reference: np.ndarray, current: np.ndarray) -> dict[str, Any]:
    sides = reference, current
    return {
        "mean": [float(side.mean()) for side in sides],
        "variance": [float(side.var()) for side in sides],
        **drift.kolmogorov_smirnov(reference, current),
    }


def _class_shares(
    reference: Mapping[str, int], current: Mapping[str, int]
) -> dict[str, Any] | None:
    """None if all records are of one class, or have no label."""
    names = [n for n in {**reference, **current} if reference.get(n) or current.get(n)]
    if len(names) < 2:
        return None
    counts = np.array([[side.get(name, 0) for name in names] for side in (reference, current)])
    shares = counts / counts.sum(axis=1, keepdims=True)
    differences = np.abs(shares[0] - shares[1])
    listed = np.argsort(-differences, kind="stable")[:_MAX_CLASSES]
    return {
        "shares": {names[i]: shares[:, i].tolist() for i in listed.tolist()},
        "statistic": float(differences.sum() / 2),
        "p_value": _chi_square(counts),
    }


def _chi_square(counts: np.ndarray) -> float:
    """The p-value of two rows of counts (2, n) under one distribution."""
    from scipy import stats

    counts = counts[:, np.argsort(counts.sum(axis=0), kind="stable")]
    expected = counts.sum(axis=0) * counts.sum(axis=1).min() / counts.sum()
    num_merged = int((expected < _MIN_EXPECTED).sum())
    num_merged += 0 < expected[:num_merged].sum() < _MIN_EXPECTED
    if num_merged:
        merged = counts[:, :num_merged].sum(axis=1)
        counts = np.column_stack([merged, counts[:, num_merged:]])
    if counts.shape[1] < 2:
        return 1.0
    return float(stats.chi2_contingency(counts, correction=False).pvalue)


def _class_warning(name: str, test: Mapping[str, Any]) -> str:
    shares = [
        f"{label} is {before:.1%} in the reference, {after:.1%} here"
        for label, (before, after) in list(test["shares"].items())[:3]
    ]
    return f"{name} have drifted: {'; '.join(shares)}; total variation {test['statistic']:.2f}"
