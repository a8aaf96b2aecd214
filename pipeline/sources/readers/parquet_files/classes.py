"""The names of the classes of Parquet files, in which labels become positions."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.sources import source
from pipeline.sources.readers import arrays
from pipeline.sources.readers.parquet_files.columns import Columns
from pipeline.sources.readers.parquet_files.copying import Copy
from pipeline.sources.readers.parquet_files.values import NOT_WHOLE

# Texts that tables hold in place of a label that is missing.
_NO_LABEL_TEXTS = ("nan", "NaN", "NA", "None")


class Named(NamedTuple):
    """The labels of n records, and what they mean."""

    labels: np.ndarray  # (n,) int64, positions in `class_names`, UNLABELLED or outside
    class_names: list[str]
    notes: list[str]


def name_classes(
    copy: Copy, columns: Columns, schemas: Mapping[str, pa.Schema], where: str
) -> Named:
    """Names the classes, and says where their names come from.

    Args:
      copy: all rows.
      columns: the columns, of which `label` is not None.
      schemas: of all files.
      where: the source, for messages.

    Raises:
      StageError: a label is too high to be a class number.
    """
    label, names, labels = columns.label, columns.class_names, copy.labels
    origin, notes, missing, others = "the metadata of the schema", [], [], []
    if texts := copy.texts:
        missing = [text for text in _NO_LABEL_TEXTS if text in texts and text not in names]
        found = sorted(texts.keys() - missing)
        if all(re.fullmatch("[0-9]+", text) for text in found):
            found.sort(key=int)
        if names:
            others = [text for text in found if text not in names]
        else:
            names, origin = found, "the texts, sorted"
        numbers = {name: n for n, name in enumerate([*names, *others])}
        own = [numbers.get(text, source.UNLABELLED) for text in texts]
        labels = np.array([*own, source.UNLABELLED], np.int64)[labels]
    highest = int(labels.max(initial=source.UNLABELLED))
    fields = [schema.field(label) for schema in schemas.values() if label in schema.names]
    if highest < 0:
        names, origin = [], "nothing: no record has a label"
    elif not names and all(pa.types.is_boolean(field.type) for field in fields):
        names, origin = ["false", "true"], "the booleans"
    elif not names:
        names = arrays.class_names_up_to(highest, f"{where}: the column {label!r}")
        origin = "the highest label"
    notes.append(f"the class names come from {origin}")
    is_outside = (labels < source.UNLABELLED) | (labels >= len(names))
    outside = labels[is_outside & (labels != source.UNLABELLED)]
    if len(outside):
        shown = others or [n for n in np.unique(outside).tolist() if n != NOT_WHOLE]
        such_as = f", such as {shown[0]!r}" if shown else ""
        expected = f"expected one of the {len(names):,} classes" if names else "expected -1 or more"
        notes.append(
            f"{len(outside):,} of {len(labels):,} records go to quarantine by their labels"
            f"{such_as}; {expected}"
        )
    if num_unlabelled := int((labels == source.UNLABELLED).sum()):
        texts_shown = "".join(f", or the text {text!r}" for text in missing)
        notes.append(
            f"{num_unlabelled:,} of {len(labels):,} records are unlabelled: a label is missing, "
            f"null or -1{texts_shown}"
        )
    return Named(labels, names, notes)
