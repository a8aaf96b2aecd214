"""Says what is read from a source: found, decided and left out. These lines open every job."""

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.cli.errors import printable
from pipeline.datasets import placement
from pipeline.sources import conversion
from pipeline.sources.splits import UNSPLIT
from pipeline.stages import quarantine

# Class names that a line shows.
_MAX_SHOWN = 12
# Records that a dry run reads.
_NUM_LOOKED_AT = 100


def lines(source: conversion.ConvertedSource, name: str, validation_fraction: float) -> list[str]:
    """What is read, a line each.

    Args:
      source: the open source.
      name: the data set's name.
      validation_fraction: share of train that goes to validation.
    """
    spec = source.source_spec
    texts = [
        f"reads {spec.source}: {_splits(source.split_sizes, validation_fraction)}",
        _classes(source),
        f"images are {'×'.join(map(str, source.image_shape))}{_conversions(spec)}",
        f"the set is named {name}: its files begin with {name}-",
        *source.notes,
        *([f"ignores {ignored_text(source.ignored)}"] if source.ignored else []),
    ]
    return [printable(text) for text in texts]


def unreadable(source: conversion.ConvertedSource) -> list[str]:
    """What is unreadable among some records from all over the source, a line; [] if nothing is."""
    num_records = sum(source.split_sizes.values())
    # Evenly spaced: a source often holds one class, or one kind of file, after the other.
    indices = np.unique(np.linspace(0, num_records - 1, _NUM_LOOKED_AT, dtype=np.int64))
    step, faults = source.for_workers().records_at_a_time, []
    for first in range(0, len(indices), step):
        part = indices[first : first + step]
        faults += [(source.where(int(part[i])), reason) for i, reason in source.read(part).faults]
    if not faults:
        return []
    reasons = "; ".join(quarantine.reasons(faults))
    return [f"{len(faults)} of {len(indices)} records that were tried are unreadable: {reasons}"]


def announce(
    command: str, source: conversion.ConvertedSource, name: str, validation_fraction: float
) -> None:
    """Prints `lines` to standard error."""
    for line in lines(source, name, validation_fraction):
        print(f"{command}: {line}", file=sys.stderr, flush=True)


def _splits(sizes: Mapping[str, int], fraction: float) -> str:
    shown = ", ".join(f"{split} {count:,}" for split, count in sizes.items() if split != UNSPLIT)
    if UNSPLIT in sizes:
        test = placement.TEST_FRACTION
        shares = {"train": 1 - fraction - test, "validation": fraction, "test": test}
        divided = ", ".join(f"{100 * share:.4g}% {split}" for split, share in shares.items())
        rest = f"{sizes[UNSPLIT]:,} records without a split, divided into {divided}"
        return f"{shown}, {rest}" if shown else rest
    if fraction and "train" in sizes:
        return f"{shown}; {100 * fraction:.4g}% of train becomes validation"
    if "validation" in sizes:
        return f"{shown}; the source's validation split of {sizes['validation']:,} is kept as it is"
    return shown


def _classes(source: conversion.ConvertedSource) -> str:
    names = source.source_class_names
    if not names:
        return "no labels: --labels=none" if not source.is_labelled else "no labels"
    fewer = source.num_source_classes > len(names)
    more = f"; the source has {source.num_source_classes:,} classes" if fewer else ""
    return f"{len(names):,} class{'es' if len(names) > 1 else ''}: {shown(names)}{more}"


def shown(names: Sequence[str]) -> str:
    """The first class names of a list, for a line."""
    return ", ".join(names[:_MAX_SHOWN]) + (", …" if len(names) > _MAX_SHOWN else "")


def _conversions(spec: conversion.SourceSpec) -> str:
    """The flags that change pixels, in the order in which they are applied."""
    flags = [
        *([f"--background={spec.background}"] if spec.background else []),
        *(["--pixel_range={:g},{:g}".format(*spec.pixel_range)] if spec.pixel_range else []),
        *(["--transpose"] if spec.transpose else []),
        *(["--grayscale"] if spec.grayscale else []),
        *(["--rgb"] if spec.rgb else []),
        *(["--image_size={}x{}".format(*spec.image_size)] if spec.image_size else []),
    ]
    return f" after {', '.join(flags)}" if flags else ""


def ignored_text(ignored: Mapping[str, int]) -> str:
    """Files that are not read: "23 files: 20 without an ending, 3 .txt"."""
    parts = [
        f"{count:,} {ending}" if ending else f"{count:,} without an ending"
        for ending, count in sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    ]
    shown = parts[:_MAX_SHOWN] + (["…"] if len(parts) > _MAX_SHOWN else [])
    total = sum(ignored.values())
    return f"{total:,} file{'s' if total > 1 else ''}: {', '.join(shown)}"
