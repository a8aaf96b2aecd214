"""Writes report.html, plots/ and projector/ of a finished export.

    python -m pipeline.report --output_dir=EXPORT_DIR --model_dir=… --data_dir=… [--split=…]

Without the images or the model, the report leaves out the figures that need them.
"""

# This file holds only flags; the work is in reports/create.py.

import contextlib

from absl import flags

from pipeline.api import exports, keywords
from pipeline.cli import command, flag_parsing, metrics_file, quiet
from pipeline.embeddings import flags as export_flags
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
flags.adopt_module_key_flags(export_flags)
flags.DEFINE_string("output_dir", None, "Directory of the export; local or a URL.")
metrics_file.define_flag()
flags.mark_flag_as_required("output_dir")
_SUBJECTS = {
    "Export, model and data set": ("output_dir", "model_dir", "run_dir", "data_dir", "split"),
    "Metrics": ("metrics_file",),
    **{f"{subject}, with --source": names for subject, names in source_flags.SUBJECTS.items()},
}


def run(_: list[str]) -> None:
    """Writes the report that the flags describe and prints its path."""
    values = flag_parsing.values_of(__name__)
    settings = keywords.ExportKeywords(**values)
    quiet.import_beam()
    from pipeline.reports import create as create_report
    from pipeline.runners import options as beam_options
    from pipeline.stages import pointer

    directory = pointer.resolve(values["output_dir"])  # Once, for all files.
    with contextlib.ExitStack() as stack:
        input_ = None
        if (settings.source, settings.data_dir) != (None, None):
            options = beam_options.parse_options([])
            opened = exports.opened_input(
                settings, options, on_corrupt="quarantine", exports=[directory]
            )
            input_ = stack.enter_context(opened)
        page = create_report.make_report(
            directory,
            input_=input_,
            model_dir=values["model_dir"],
            run_dir=values["run_dir"],
        )
    print(f"report: {page}")


def main() -> None:
    """Entry point of `vae-report`."""
    command.run(run, name="report", doc=__doc__, module=__name__, subjects=_SUBJECTS)


if __name__ == "__main__":
    main()
