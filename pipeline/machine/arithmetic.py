"""The kind of arithmetic of this process: device, instruction set, TensorFlow version.

The last digits of a model's outputs depend on the kind: oneDNN, with which TensorFlow computes on a
CPU, has different kernels for different instruction sets. So the kind is recorded with the times,
in timings.json and timings.jsonl, and in no file that is a function of the inputs.
"""

import os
import platform

# oneDNN's names of instruction sets, and the flags in /proc/cpuinfo that each needs beside the
# flags of those before it; https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html.
_ISAS = (
    ("SSE41", {"sse4_1"}),
    ("AVX", {"avx"}),
    ("AVX2", {"avx2", "fma"}),
    ("AVX512_CORE", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
    ("AVX512_CORE_VNNI", {"avx512_vnni"}),
    ("AVX512_CORE_BF16", {"avx512_bf16"}),
    ("AVX512_CORE_FP16", {"avx512_fp16"}),
    ("AVX512_CORE_AMX", {"amx_tile", "amx_int8", "amx_bf16"}),
)
# Environment variables that limit oneDNN to older instruction sets.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
# The kind of rows from a version that did not record the kind.
NOT_RECORDED = "not recorded"


def kind() -> str:
    """The kind, such as "CPU AVX2, TensorFlow 2.21.0"; imports TensorFlow."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    names = {tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus}
    if not gpus:
        return f"CPU {_isa()}, TensorFlow {tf.__version__}"
    # An older GPU has no TensorFloat-32, whatever TensorFlow allows.
    details = tf.config.experimental.get_device_details(gpus[0])
    capability = details.get("compute_capability", (0, 0))
    rounds = (
        tf.config.experimental.tensor_float_32_execution_enabled()
        and capability >= (8, 0)
        and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    )
    device = f"GPU {', '.join(sorted(map(str, names)))}{' with TF32' if rounds else ''}"
    return f"{device}, TensorFlow {tf.__version__}"


def _isa() -> str:
    """The instruction set that oneDNN computes with; the processor's name where that is unknown."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        flags = []
    limit = next((os.environ[name].upper() for name in _LIMITS if os.environ.get(name)), "")
    isa = platform.machine()
    for name, required_flags in _ISAS:
        if not required_flags <= set(flags):
            break
        isa = name
        if name == limit:
            break
    return isa
