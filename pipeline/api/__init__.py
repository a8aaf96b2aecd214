"""The stages preprocess and export as functions of Python.

Importing this defines no flag and imports neither Beam nor TensorFlow. docs/python.md shows the
functions at work.
"""

from pipeline.api.data_sets import DataSet, preprocess
from pipeline.api.exports import Export, export
from pipeline.cli.errors import Interrupted, StageError, UsageError

__all__ = [
    "DataSet",
    "Export",
    "Interrupted",
    "StageError",
    "UsageError",
    "export",
    "preprocess",
]
