"""Writes report.html, plots/ and projector/ of a finished export.

A report needs the export; the images, the model and the training run are optional. data.py reads
them, sections.py makes the sections and the plots, page.py the HTML.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.cli.errors import StageError
from pipeline.embeddings.inputs import Input
from pipeline.reports import state as state_lib
from pipeline.reports.state import PAGE
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import output_directory
from pipeline.storage import files as files_lib
from pipeline.storage import lock

_FORMAT_VERSION = 1


def _state(export_dir: str) -> dict[str, Any] | None:
    try:
        return state_lib.read(export_dir)
    except StageError:
        return None  # Damaged: the report is written again.


def remove_stale(export_dir: str, export_id: str) -> None:
    """Removes the report of an earlier export, which was replaced by the one with `export_id`."""
    state = _state(export_dir)
    if state and state["export_id"] != export_id:
        _remove(export_dir, state, names_to_keep=())


def _remove(export_dir: str, state: Mapping[str, Any], names_to_keep: Collection[str]) -> None:
    for entry in state["files"]:
        if entry["name"] not in names_to_keep:
            files_lib.remove(files_lib.join(export_dir, *entry["name"].split("/")))
    for directory in {entry["name"].rpartition("/")[0] for entry in state["files"]} - {""}:
        files_lib.remove_empty(files_lib.join(export_dir, directory))
    if not names_to_keep:
        files_lib.remove(files_lib.join(export_dir, state_lib.FILE))


def is_current(export_dir: str, export_id: str) -> bool:
    """Whether the directory holds a complete report of the export with `export_id`."""
    state = _state(export_dir)
    expected = _FORMAT_VERSION, export_id
    if not state or (state.get("format_version"), state["export_id"]) != expected:
        return False
    return output_directory.are_complete(export_dir, state["files"])


def make_report(
    export_dir: str,
    *,
    input_: Input | None,
    model_dir: str | None,
    run_dir: str | None,
) -> str:
    """Writes the report of a finished export; replaces an earlier report.

    Args:
      export_dir: local path or fsspec URL.
      input_: the images; None leaves out the figures that need them.
      model_dir: the model of the export; None leaves out the figures that need it.
      run_dir: the workdir of the training run; None for the parent directory of model_dir.

    Returns:
      The path of report.html.

    Raises:
      StageError: no such export, or images or model are not those of the export.
    """
    from pipeline.reports import data as report_data
    from pipeline.reports import sections

    manifest = manifest_lib.read_manifest(export_dir, "export", "--output_dir")
    with lock.hold(export_dir):
        data = report_data.ReportData(
            export_dir, manifest, input_=input_, model_dir=model_dir, run_dir=run_dir
        )
        report = sections.Report(data)
        files = {PAGE: report.page(), **report.files()}
        previous_state = _state(export_dir) or {"files": []}
        # If this process is killed from here on, the next report knows which files to remove.
        all_files = [{"name": name} for name in files] + previous_state["files"]
        _write_state(export_dir, "", all_files)
        entries = []
        for name, content in files.items():
            directory, _, base_name = name.rpartition("/")
            target = files_lib.join(export_dir, directory) if directory else export_dir
            files_lib.make_dirs(target)
            entries.append({**manifest_lib.write_file(target, base_name, content), "name": name})
        _remove(export_dir, previous_state, names_to_keep=files)
        manifest_lib.sync_files(export_dir, entries)
        _write_state(export_dir, manifest["export_id"], entries)
    return files_lib.join(export_dir, PAGE)


def _write_state(export_dir: str, export_id: str, files: Sequence[Mapping[str, Any]]) -> None:
    state = {"format_version": _FORMAT_VERSION, "export_id": export_id, "files": files}
    files_lib.write_bytes(
        files_lib.join(export_dir, state_lib.FILE), manifest_lib.sealed_json(state)
    )
    files_lib.sync(export_dir)
