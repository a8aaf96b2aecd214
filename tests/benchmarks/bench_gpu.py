"""Times training on this machine's GPUs: images/s, scaling, share of peak, launches, the host.

    make bench-gpu
    make bench-gpu FLAGS=1024     with this many images a GPU alone

Ends with status 1 and measures nothing where TensorFlow sees no GPU. `--rehearse` goes the same
way on two parts of the CPU, with few images: its numbers say nothing.
"""

import sys
import time

import numpy as np

from pipeline.cli import quiet
from tests.benchmarks.bench_train import FLOPS_PER_IMAGE, Prepared, prepare
from tests.benchmarks.timing import median_secs
from tests.trainer import gpu_graphs

_NUM_STEPS = 100  # of one call; the host looks every 20 steps in the other.
_STEPS_BETWEEN_LOOKS = 20
_IMAGES_PER_GPU = (256, 1024, 2048)
_VARIANTS = (
    {"precision": "float32"},
    {"precision": "float32", "jit_compile": True},
    {"precision": "mixed_bfloat16"},
    {"precision": "mixed_bfloat16", "jit_compile": True},
    {"precision": "mixed_float16"},
)
# Dense peak of one device by a word in its name, in TFLOP/s: TensorFloat-32, which TensorFlow
# uses for float32, and bfloat16. From the vendor's data sheets, without sparsity.
_PEAK_TFLOPS = {
    "H100": (494.7, 989.4),
    "H200": (494.7, 989.4),
    "A100": (156.0, 312.0),
    "L4": (60.0, 121.0),
}
_HEADINGS = (
    *("variant", "images a GPU", "1 GPU, images/s", "all, images/s", "scaling", "of peak"),
    *("looking every 20", "launches a step"),
)


def _peak(precision: str, device: str) -> float | None:
    """FLOP/s of one device, if its name is known."""
    known = next((peaks for word, peaks in _PEAK_TFLOPS.items() if word in device), None)
    return known and known[precision != "float32"] * 1e12


def _launches(prepared: Prepared, num_gpus: int) -> str:
    """Kernels that a step starts on a GPU, by its graph; what XLA makes is not among them."""
    traced = prepared.steps.train.get_concrete_function(*prepared.arguments)
    return str(gpu_graphs.launches_per_step(gpu_graphs.operations_of(traced)) // num_gpus)


def bench(
    device: str, num_gpus: int, per_gpu: int, num_steps: int, *, one: dict, every: dict, about: dict
) -> list[str]:
    """A line of the table: one GPU, all of them, and all of them with the host in between.

    Args:
      device: name of one.
      num_gpus: how many there are.
      per_gpu: images of a step on each.
      num_steps: of one call.
      one: config of one GPU.
      every: config of all of them.
      about: config of both.
    """
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (per_gpu * num_gpus, 28, 28, 1)).astype(np.uint8)
    # Over and over the same batch: a set of one for each step would be of another size.
    images = np.tile(images, (num_steps, 1, 1, 1))
    of_one = images[: per_gpu * num_steps]
    batch = per_gpu * num_gpus
    single = prepare(of_one, num_steps=num_steps, batch_size=per_gpu, **one, **about)
    looks = num_steps // _STEPS_BETWEEN_LOOKS or 1
    part = prepare(images, num_steps=num_steps // looks, batch_size=batch, **every, **about)
    whole = prepare(images, num_steps=num_steps, batch_size=batch, **every, **about)

    def in_parts() -> None:
        for _ in range(looks):
            part()

    single_secs, parts_secs, whole_secs = median_secs(single, in_parts, whole)
    rates = per_gpu * num_steps / single_secs, batch * num_steps / whole_secs
    peak = _peak(about["precision"], device)
    return [
        about["precision"] + ", XLA" * about.get("jit_compile", False),
        f"{per_gpu:,}",
        *(f"{rate:,.0f}" for rate in rates),
        f"{rates[1] / rates[0] / num_gpus:.2f}",
        f"{rates[1] * FLOPS_PER_IMAGE / (peak * num_gpus):.1%}" if peak else "?",
        f"{parts_secs / (num_steps // looks * looks) * num_steps / whole_secs:.2f} × the time",
        _launches(whole, num_gpus),
    ]


def main(arguments: list[str]) -> int:
    """Runs the benchmark, or says why not."""
    quiet.import_tensorflow()
    import tensorflow as tf

    rehearses = arguments == ["--rehearse"]
    sizes = [int(text) for text in arguments if text.isdecimal()] or _IMAGES_PER_GPU
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and not rehearses:
        print(
            "bench-gpu: TensorFlow sees no GPU here, so nothing was measured; run it where "
            "nvidia-smi shows one, after make setup EXTRAS=cuda",
            file=sys.stderr,
        )
        return 1
    one, every, num_gpus, device = {"strategy": "one_device"}, {}, len(gpus), "CPU"
    num_steps = _NUM_STEPS
    if rehearses:
        every, num_gpus, sizes, num_steps = {"num_virtual_devices": 2}, 2, (4,), 2
        one = {"num_virtual_devices": 2, "strategy": "one_device"}
    else:
        device = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    print(f"{num_gpus} × {device}, TensorFlow {tf.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print(f"| {' | '.join(_HEADINGS)} |\n|{'---|' * len(_HEADINGS)}")
    for about in _VARIANTS:
        for per_gpu in sizes:
            line = bench(device, num_gpus, per_gpu, num_steps, one=one, every=every, about=about)
            print(f"| {' | '.join(line)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
