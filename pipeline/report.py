"""Writes report.html, plots/ and projector/ of a finished export.

    python -m pipeline.report --output_dir=EXPORT_DIR --model_dir=… --data_dir=… [--split=…]

Without the images or the model, the report leaves out the figures that need them.
"""

# This file holds only flags; the work is in reports/create.py.

from absl import flags

from pipeline.cli import command, quiet
from pipeline.embeddings import flags as export_flags
from pipeline.sources import flags as source_flags

flags.adopt_module_key_flags(source_flags)
flags.adopt_module_key_flags(export_flags)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory of the export; local or a URL.")
flags.mark_flag_as_required("output_dir")
_SUBJECTS = {
    "Export, model and data set": ("output_dir", "model_dir", "run_dir", "data_dir", "split"),
    **{f"{subject}, with --source": names for subject, names in source_flags.SUBJECTS.items()},
}


def run(_: list[str]) -> None:
    """Writes the report that the flags describe and prints its path."""
    quiet.import_beam()
    from pipeline.reports import create as create_report
    from pipeline.stages import pointer

    directory = pointer.resolve(_OUTPUT_DIR.value)  # Once, for all files.
    input_ = None
    if export_flags.names_images():
        input_ = export_flags.image_set("quarantine", [directory])
    page = create_report.make_report(
        directory,
        input_=input_,
        model_dir=export_flags.MODEL_DIR.value,
        run_dir=export_flags.RUN_DIR.value,
    )
    print(f"report: {page}")


def main() -> None:
    """Entry point of `vae-report`."""
    command.run(run, name="report", doc=__doc__, module=__name__, subjects=_SUBJECTS)


if __name__ == "__main__":
    main()
