"""Measures a published model on a data set: ELBO, log-likelihood, active units.

    python -m trainer.evaluate --model_dir=DIR --data_dir=DIR --num_importance_samples=5000

Prints a table and writes its numbers as JSON. The numbers are a function of model, data set,
split and number of samples.
"""

# This file only defines flags; the measurement is in runs/measure.py.

from absl import flags

from pipeline.cli import command, metrics_file, quiet

_MODEL_DIR = flags.DEFINE_string("model_dir", None, "Published model directory: <workdir>/export.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Output directory of preprocess.")
_SPLIT = flags.DEFINE_string("split", "test", "Split to measure on.")
_NUM_IMPORTANCE_SAMPLES = flags.DEFINE_integer(
    "num_importance_samples",
    5000,
    "Samples for each image for the log-likelihood; the time is proportional to them.",
    lower_bound=1,
    upper_bound=10**7,
)
_OUTPUT_FILE = flags.DEFINE_string(
    "output_file", None, "Path of the JSON file; default: <model_dir>/evaluation-<split>.json."
)
_NUM_VIRTUAL_DEVICES = flags.DEFINE_integer(
    "num_virtual_devices",
    0,
    "n: n replicas on the CPU; 0: all GPUs, or the CPU if there is none.",
    lower_bound=0,
    upper_bound=64,
)
metrics_file.define_flag()
flags.mark_flags_as_required(["model_dir", "data_dir"])


def run(_: list[str]) -> None:
    """Measures as the flags say and prints the table."""
    quiet.import_tensorflow()
    from trainer.runs import measure

    measurements = measure.measure(
        model_dir=_MODEL_DIR.value,
        data_dir=_DATA_DIR.value,
        split=_SPLIT.value,
        num_importance_samples=_NUM_IMPORTANCE_SAMPLES.value,
        num_virtual_devices=_NUM_VIRTUAL_DEVICES.value,
    )
    print(measure.table(measurements), flush=True)
    print(f"evaluate: {measure.write(measurements, _MODEL_DIR.value, _OUTPUT_FILE.value)}")


def main() -> None:
    """Entry point of `vae-evaluate`."""
    command.run(run, name="evaluate", doc=__doc__, module=__name__, beam=False)


if __name__ == "__main__":
    main()
