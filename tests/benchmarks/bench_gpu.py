"""Times training on this machine's GPUs: images/s, share of peak, and the host's part.

    make bench-gpu

Ends with status 1 and measures nothing where TensorFlow sees no GPU.
"""

import sys
import time

import numpy as np

from pipeline import command
from tests.benchmarks.bench_train import FLOPS_PER_IMAGE, prepare
from tests.benchmarks.timing import median_secs, report

_NUM_RECORDS = 60_000
# Dense peak of one device by a word in its name, in TFLOP/s: TensorFloat-32, which TensorFlow
# uses for float32, and bfloat16. From the vendor's data sheets, without sparsity.
_PEAK_TFLOPS = {
    "H100": (494.7, 989.4),
    "H200": (494.7, 989.4),
    "A100": (156.0, 312.0),
    "L4": (60.0, 121.0),
}


def _peak(precision: str, device: str) -> float | None:
    """FLOP/s of one device, if its name is known."""
    known = next((peaks for word, peaks in _PEAK_TFLOPS.items() if word in device), None)
    return known and known[precision != "float32"] * 1e12


def bench(images: np.ndarray, device: str, num_gpus: int, precision: str, batch_size: int) -> None:
    """An epoch in calls of 20 steps, against the same epoch in one call without the host."""
    num_steps = len(images) // batch_size
    about = {"precision": precision, "batch_size": batch_size}
    in_parts = prepare(images, num_steps=20, **about)
    whole = prepare(images, num_steps=num_steps, **about)

    def epoch() -> None:
        for _ in range(num_steps // 20):
            in_parts()

    parts, one_call = median_secs(epoch, whole)
    rate = num_steps * batch_size / one_call
    peak = _peak(precision, device)
    share = f"{rate * FLOPS_PER_IMAGE / (peak * num_gpus):.1%}" if peak else "?"
    report(f"{precision}, {batch_size}", f"{rate:,.0f} images/s", share, "of the devices' peak")
    in_20 = parts / (num_steps // 20 * 20) * num_steps
    report("", "", f"{in_20 / one_call:.2f} ×", "the time, where the host looks every 20 steps")


def main() -> int:
    """Runs the benchmark, or says why not."""
    command.import_tensorflow()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        print(
            "bench-gpu: TensorFlow sees no GPU here, so nothing was measured; run it where "
            "nvidia-smi shows one, after make setup EXTRAS=cuda",
            file=sys.stderr,
        )
        return 1
    device = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    print(f"{len(gpus)} × {device}, TensorFlow {tf.__version__}, {time.strftime('%Y-%m-%d')}")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (_NUM_RECORDS, 28, 28, 1)).astype(np.uint8)
    for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
        for batch_size in (256, 2048):
            bench(images, device, len(gpus), precision, batch_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
