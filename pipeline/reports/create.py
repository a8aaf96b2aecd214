"""What people look at: report.html, plots/ and projector/ of a finished export.

Made from what is there: the export, and as far as they are named the images, the model and
the run that trained it. data.py reads that, sections.py has what stands in a
report, page.py the page.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.embeddings.inputs import Input
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import manifest_check, output_directory
from pipeline.storage import files as files_lib
from pipeline.storage import lock

PAGE = "report.html"
# Says of which export the report is, and names its files: written last.
_STATE = "report.json"
_FORMAT_VERSION = 1


def _state(export_dir: str) -> dict[str, Any] | None:
    path = files_lib.join(export_dir, _STATE)
    try:
        state = manifest_lib.read_sealed(path)
        if state is not None:
            manifest_check.report(path, state)
    except StageError:
        return None  # Damaged: the report is made again.
    return state


def remove_other(export_dir: str, export_id: str) -> None:
    """Removes the report of an export that is not there any more."""
    state = _state(export_dir)
    if state and state["export_id"] != export_id:
        _remove(export_dir, state, kept=())


def _remove(export_dir: str, state: Mapping[str, Any], kept: Any) -> None:
    for entry in state["files"]:
        if entry["name"] not in kept:
            files_lib.remove(files_lib.join(export_dir, *entry["name"].split("/")))
    for directory in {entry["name"].rpartition("/")[0] for entry in state["files"]} - {""}:
        files_lib.remove_empty(files_lib.join(export_dir, directory))
    if not kept:
        files_lib.remove(files_lib.join(export_dir, _STATE))


def is_current(export_dir: str, export_id: str) -> bool:
    """Whether the report of that very export is there and whole."""
    state = _state(export_dir)
    asked = _FORMAT_VERSION, export_id
    if not state or (state.get("format_version"), state["export_id"]) != asked:
        return False
    return output_directory.are_complete(export_dir, state["files"])


def make_report(
    export_dir: str,
    *,
    input_: Input | None,
    model_dir: str | None,
    run_dir: str | None,
) -> str:
    """Makes the report of a finished export, in place of the one that is there.

    Args:
      export_dir: local path or fsspec URL.
      input_: the images; None to do without.
      model_dir: the model that made the export; None to do without.
      run_dir: the workdir in which it was trained; what holds model_dir if left out.

    Returns:
      The page's path.

    Raises:
      StageError: no such export, or the model is another.
    """
    from pipeline.reports import data as report_data
    from pipeline.reports import sections

    manifest = manifest_lib.read_manifest(export_dir, "export", "output_dir")
    with lock.hold(export_dir):
        read = report_data.ReportData(
            export_dir, manifest, input_=input_, model_dir=model_dir, run_dir=run_dir
        )
        report = sections.Report(read)
        files = {PAGE: report.page(), **report.files()}
        before = _state(export_dir) or {"files": []}
        # Stopped from here on, the next report knows what this one has written.
        there = [{"name": name} for name in files] + before["files"]
        _write_state(export_dir, "", there)
        entries = []
        for name, data in files.items():
            directory, _, last = name.rpartition("/")
            target = files_lib.join(export_dir, directory) if directory else export_dir
            files_lib.make_dirs(target)
            entries.append({**manifest_lib.write_file(target, last, data), "name": name})
        _remove(export_dir, before, kept=files)
        _write_state(export_dir, manifest["export_id"], entries)
    return files_lib.join(export_dir, PAGE)


def _write_state(export_dir: str, export_id: str, files: Sequence[Mapping[str, Any]]) -> None:
    state = {"format_version": _FORMAT_VERSION, "export_id": export_id, "files": files}
    files_lib.write_bytes(files_lib.join(export_dir, _STATE), manifest_lib.sealed_json(state))
