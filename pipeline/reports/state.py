"""report.json: names the export that a report belongs to, and the report's files; written last."""

from typing import Any

from pipeline.stages import manifest as manifest_lib
from pipeline.stages import manifest_check
from pipeline.storage import files

FILE = "report.json"
PAGE = "report.html"


def read(export_dir: str) -> dict[str, Any] | None:
    """The content of an export's report.json; None if there is none.

    Its export_id is "" while the report's files are written.

    Raises:
      StageError: the file is damaged, or has values that this program never writes.
    """
    path = files.join(export_dir, FILE)
    state = manifest_lib.read_sealed(path)
    if state is not None:
        manifest_check.report(path, state)
    return state
