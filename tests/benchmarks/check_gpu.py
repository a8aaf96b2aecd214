"""The checks of docs/gpu.md that one machine can run, as a table to paste.

    make check-gpu                     all of them
    make check-gpu FLAGS="2 5 6"       some of them, by number

Each check runs in a process of its own, since TensorFlow's settings hold for a process. A check
that needs what the machine lacks says so. `--rehearse` goes the same way on the CPU, with a small
model: it shows that the checks themselves work, and nothing else.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.conftest import REPOSITORY

_REHEARSES = "REHEARSE_CHECK_GPU"
_MODULE = "tests.benchmarks.check_gpu"
_NUM_STEPS = 20
_NUM_PROFILED = 100
_CHECK_SECS = 3600


class Shown(NamedTuple):
    """What a check has shown."""

    text: str
    verdict: str  # "ok", "FAILED", "look": a number without a bound, or "not here"


def _ok(holds: bool, text: str) -> Shown:
    return Shown(text, "ok" if holds else "FAILED")


def _rehearses() -> bool:
    return _REHEARSES in os.environ


def _output(*command: str, **environment: str) -> str:
    """Standard output of a command.

    Raises:
      RuntimeError: it failed; with the end of its standard error.
    """
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=_CHECK_SECS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[:4]}: status {done.returncode}: {done.stderr[-300:]}")
    return done.stdout


def _run(*arguments: str, **environment: str) -> str:
    """Standard output of a Python module."""
    return _output(sys.executable, "-m", *arguments, **environment)


def _in_process(name: str, *arguments: str, **environment: str) -> str:
    """The last line of a function of this file, run in a process of its own."""
    return _run(_MODULE, name, *arguments, **environment).splitlines()[-1]


def _config() -> str:
    return "configs/smoke.py" if _rehearses() else "configs/mnist.py"


# Run in processes of their own, by name.


def _prepared(num_steps: int = _NUM_STEPS, **changes):
    from configs import smoke
    from tests.benchmarks import bench_train

    small = dict(smoke.get_config()) if _rehearses() else {}
    chosen = ("filters", "strides", "hidden_units", "latent_dim", "batch_size")
    small = {key: small[key] for key in chosen if key in small}
    images = np.random.default_rng(0).integers(0, 256, (5_120, 28, 28, 1)).astype(np.uint8)
    return bench_train.prepare(images, num_steps=num_steps, **{**small, **changes})


def first_step() -> None:
    """Prints the seconds of a first step, in which CUDA compiles what it has no binary for."""
    started = time.perf_counter()
    _prepared(1)
    print(time.perf_counter() - started)


def strict() -> None:
    """Trains and evaluates where nothing may fall back to another device."""
    import tensorflow as tf

    tf.config.set_soft_device_placement(False)
    prepared = _prepared()
    prepared.steps.evaluator.evaluate(*prepared.arguments)
    print("all operations ran where they were placed")


def profile(directory: str) -> None:
    """Prints how many kernels a step runs and how many bytes it copies to and from the host."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    prepared = _prepared(_NUM_PROFILED)
    tf.profiler.experimental.start(directory)
    prepared()
    tf.profiler.experimental.stop()
    (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    num_kernels = num_bytes = 0
    for plane in space.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        names = {key: about.name for key, about in plane.stat_metadata.items()}
        for stat in (s for line in plane.lines for event in line.events for s in event.stats):
            num_kernels += names[stat.metadata_id] == "kernel_details"
            if names[stat.metadata_id] == "memcpy_details":
                details = stat.str_value or names[stat.ref_value]
                if "kind_src:device kind_dst:device" not in details:
                    num_bytes += int(re.search(r"size:(\d+)", details)[1])
    print(json.dumps([num_kernels / _NUM_PROFILED, num_bytes / _NUM_PROFILED]))


def losses(changes: str, tf32: str = "") -> None:
    """Prints the loss of each step, a hash of the weights, and the peak of the device's memory."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(bool(tf32))
    about = json.loads(changes)
    distribution = None
    if about.pop("split", False):  # One device as two, which share no NCCL.
        kind = "CPU" if _rehearses() else "GPU"
        parts = [tf.config.LogicalDeviceConfiguration(None if _rehearses() else 8192)] * 2
        physical = tf.config.list_physical_devices(kind)[0]
        tf.config.set_logical_device_configuration(physical, parts)
        distribution = tf.distribute.MirroredStrategy(
            [f"{kind}:0", f"{kind}:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
    if about.get("deterministic"):
        tf.keras.utils.set_random_seed(0)
        tf.config.experimental.enable_op_determinism()
    prepared = _prepared(distribution=distribution, **about)
    rows = prepared()
    weights = b"".join(
        np.asarray(getattr(variable.value, "values", [variable.value])[0]).tobytes()
        for variable in prepared.steps.evaluator.vae.variables
    )
    peak = 0
    with contextlib.suppress(ValueError):  # Of a CPU it is not known.
        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    per_image = rows[:, 0] / rows[:, 3]
    told = {
        "losses": per_image.tolist(),
        "weights": hashlib.sha256(weights).hexdigest(),
        "peak_mib": peak >> 20,
    }
    print(json.dumps(told))


def _losses(tf32: bool = False, on_cpu: bool = False, **changes) -> dict:
    environment = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    return json.loads(_in_process("losses", json.dumps(changes), "tf32" * tf32, **environment))


def _apart(a: dict, b: dict) -> float:
    """The largest difference of two runs' losses, as a share."""
    return float(np.max(np.abs(np.subtract(a["losses"], b["losses"]) / np.asarray(b["losses"]))))


_IN_PROCESS = {work.__name__: work for work in (first_step, strict, profile, losses)}


# The checks, in the order of docs/gpu.md.


def libraries(scratch: str) -> Shown:
    """Are CUDA's libraries there, and how long does the driver compile PTX?"""
    from pipeline.machine import gpus

    missing = gpus.missing_library()
    cache = {"CUDA_CACHE_PATH": f"{scratch}/cuda", "CUDA_CACHE_MAXSIZE": str(4 << 30)}
    fresh, again = (float(_in_process("first_step", **cache)) for _ in range(2))
    text = f"missing: {missing or 'none'}; first step {fresh:.0f} s, again {again:.0f} s"
    return _ok(_rehearses() or (not missing and again < fresh), text)


def strict_placement(_: str) -> Shown:
    """Does anything fall back to the host?"""
    return _ok(True, _in_process("strict"))


def kernels_and_bytes(scratch: str) -> Shown:
    """What does a step launch and copy?"""
    kernels, num_bytes = json.loads(_in_process("profile", f"{scratch}/profile"))
    text = f"{kernels:.0f} kernels a step; {num_bytes / 1e3:.1f} kB to and from the host"
    return _ok(_rehearses() or 0 < kernels < 250 and num_bytes < 1e5, text)


def bench(_: str) -> Shown:
    """What does it cost? The table follows this one."""
    print(_run("tests.benchmarks.bench_gpu", *["--rehearse"] * _rehearses()), file=sys.stderr)
    return Shown("the table above", "look")


def cpu_and_gpu(_: str) -> Shown:
    """Do CPU and GPU train alike?"""
    cpu, full, rounded = _losses(on_cpu=True), _losses(), _losses(tf32=True)
    exact, loose = _apart(full, cpu), _apart(rounded, cpu)
    return _ok(exact <= 1e-3, f"without TF32 {exact:.1e} apart, with TF32 {loose:.1e}")


def bits(_: str) -> Shown:
    """Do two runs end in the same bits?"""
    twice = [[_losses(deterministic=value)["weights"] for _ in range(2)] for value in (True, False)]
    equal = [one == other for one, other in twice]
    return _ok(
        equal[0], f"deterministic: {'equal' if equal[0] else 'not equal'}; not: {equal[1]!s:.5}"
    )


def suite(_: str) -> Shown:
    """Do the tests pass?"""
    if _rehearses():
        return Shown("make test runs them", "not here")
    return _ok(True, _run("pytest", "-q", "-n", "2", "--dist=loadfile").splitlines()[-1])


def replicas(_: str) -> Shown:
    """Do 2 replicas walk the path of 1?"""
    apart = _apart(_losses(split=True), _losses())
    rounded = _apart(_losses(split=True, tf32=True), _losses(tf32=True))
    return _ok(apart <= 1e-4, f"without TF32 {apart:.1e} apart, with TF32 {rounded:.1e}")


def _trained(scratch: str, *flags: str) -> str:
    """The directory of a data set and of a model, made at the first call."""
    if not os.path.exists(f"{scratch}/shards"):
        sample = ("--source=sample", "--num_shards=4")
        _run("pipeline.preprocess", *sample, f"--output_dir={scratch}/shards")
        _run(
            "trainer.main",
            f"--config={_config()}",
            f"--config.data_dir={scratch}/shards",
            f"--workdir={scratch}/run",
            "--config.num_epochs=1",
            *flags,
        )
    return f"{scratch}/run/export"


def evaluate(scratch: str) -> Shown:
    """Does evaluation end, and with a CPU's number?"""
    model = _trained(scratch)
    values = []
    for devices in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        _run(
            "trainer.evaluate",
            f"--model_dir={model}",
            f"--data_dir={scratch}/shards",
            "--num_importance_samples=50",
            f"--output_file={scratch}/evaluation.json",
            **devices,
        )
        values.append(json.loads(pathlib.Path(f"{scratch}/evaluation.json").read_text()))
    here, cpu = (value["log_likelihood"] for value in values)
    return _ok(abs(here - cpu) <= 1e-3 * abs(cpu), f"{here:.3f} nats; on the CPU {cpu:.3f}")


def precisions_and_routes(_: str) -> Shown:
    """Do the precisions, XLA and the five routes agree? How much memory do they take?"""
    plain = _losses(tf32=True)
    text = [f"float32 {plain['peak_mib']} MiB"]
    holds = True
    for changes in (
        {"precision": "mixed_bfloat16"},
        {"precision": "mixed_float16"},
        {"jit_compile": True},
    ):
        told = _losses(tf32=True, **changes)
        holds = holds and _apart(told, plain) <= 0.02
        name = next(iter(changes.values()))
        name = "XLA" if name is True else name
        text.append(f"{name} {_apart(told, plain):.1e} apart, {told['peak_mib']} MiB")
    more = ["--num_steps=20", "--num_rounds=3", "--config=configs/smoke.py"] * _rehearses()
    _run("trainer.compare_routes", *more)
    text.append("compare_routes: status 0")
    return _ok(holds, "; ".join(text))


def export_bits(scratch: str) -> Shown:
    """Do exports equal each other byte for byte, and a CPU's nearly?"""
    import pyarrow.dataset

    model = _trained(scratch)
    ways = {
        "one": ([], {}),
        "two processes": (["--direct_num_workers=2"], {}),
        "cpu": ([], {"CUDA_VISIBLE_DEVICES": ""}),
        "fast": (["--fast_math"], {}),
    }
    tables, hashes = {}, {}
    for name, (more, devices) in ways.items():
        out = f"{scratch}/{name}"
        flags = (f"--data_dir={scratch}/shards", f"--model_dir={model}", f"--output_dir={out}")
        _run("pipeline.export", *flags, "--images=none", *more, **devices)
        files = sorted(pathlib.Path(out, "embeddings").glob("*.parquet"))
        hashes[name] = [hashlib.sha256(path.read_bytes()).digest() for path in files]
        table = pyarrow.dataset.dataset([str(path) for path in files]).to_table()
        tables[name] = np.array(table["mean"].to_pylist(), np.float32)
    equal = hashes["one"] == hashes["two processes"]
    apart, fast = (np.abs(tables["one"] - tables[name]).max() for name in ("cpu", "fast"))
    text = f"1 and 2 processes: {'equal' if equal else 'NOT equal'}"
    return _ok(
        equal and apart <= 1e-3, f"{text}; {apart:.1e} from the CPU's, {fast:.1e} with fast_math"
    )


def _stopped_and_whole(scratch: str, *start: str) -> Shown:
    """Does a run that two signals stop end as a run that nothing stops?

    Args:
      scratch: a directory.
      start: the module that trains, and its own flags.
    """
    _trained(scratch)
    identities, statuses = [], []
    for name, stops in (("whole", 0), ("stopped", 2)):
        command = [
            *(sys.executable, "-m", *start),
            *(f"--config={_config()}", f"--config.data_dir={scratch}/shards"),
            *(f"--workdir={scratch}/{start[0]}-{name}", "--config.num_epochs=30"),
            *("--config.deterministic=True", "--config.checkpoint_every_steps=10"),
        ]
        for number in range(stops + 1):
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            launched = subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes)
            watch = threading.Timer(_CHECK_SECS, launched.kill)
            watch.start()
            last = ""
            for last in launched.stderr:
                if number < stops and re.match(r"(\[0\] )?epoch", last):
                    launched.send_signal(signal.SIGTERM)
            statuses.append(launched.wait())
            watch.cancel()
            if statuses[-1] not in (0, 75):
                raise RuntimeError(f"{start[0]}: status {statuses[-1]}: {last}")
        manifest = pathlib.Path(f"{scratch}/{start[0]}-{name}/export/manifest.json")
        identities.append(json.loads(manifest.read_text())["model_id"] if manifest.exists() else "")
    holds = statuses == [0, 75, 75, 0] and identities[0] == identities[1]
    return _ok(holds, f"statuses {statuses}, model_id {' and '.join(identities)}")


def workers(scratch: str) -> Shown:
    """Does a cluster stop, go on, and end as one that was never stopped?"""
    from pipeline.machine import gpus

    if not _rehearses() and len(gpus.visible()) < 2:
        return Shown("needs 2 GPUs; for 2 hosts see docs/gpu.md", "not here")
    return _stopped_and_whole(scratch, "trainer.launch", "--num_workers=2", "--")


def resume(scratch: str) -> Shown:
    """Does one process stop, go on, and end as one that was never stopped?"""
    return _stopped_and_whole(scratch, "trainer.main")


# In the order of docs/gpu.md: what is expected, and what shows it.
CHECKS: tuple[tuple[str, Callable[[str], Shown]], ...] = (
    ("no library is missing; the second start compiles nothing", libraries),
    ("no error with soft placement off", strict_placement),
    ("fewer than 250 kernels and 100 kB a step", kernels_and_bytes),
    ("a table", bench),
    ("1e-3 without TF32", cpu_and_gpu),
    ("equal with deterministic=True", bits),
    ("all tests pass", suite),
    ("1e-4 without TF32", replicas),
    ("1e-3 of the CPU's value", evaluate),
    ("2 % of float32; status 0", precisions_and_routes),
    ("equal bytes; 1e-3 from the CPU's", export_bits),
    ("status 75, then 0, and one model_id", workers),
    ("status 75, then 0, and one model_id", resume),
)


def main(arguments: list[str]) -> int:
    """Runs checks by number, all if none is named, and prints the table."""
    if arguments and arguments[0] in _IN_PROCESS:
        from pipeline.cli import quiet

        quiet.import_tensorflow()
        _IN_PROCESS[arguments[0]](*arguments[1:])
        return 0
    if "--rehearse" in arguments:
        os.environ[_REHEARSES] = "1"
    from pipeline.machine import gpus

    if not _rehearses() and not gpus.visible():
        print(
            "check-gpu: this machine has no GPU; run it where nvidia-smi shows one", file=sys.stderr
        )
        return 1
    every = [str(number) for number in range(1, len(CHECKS) + 1)]
    named = [text for text in arguments if text != "--rehearse"]
    wrong = [text for text in named if text not in every]
    if wrong:
        print(f"check-gpu: {wrong[0]!r}: expected numbers from 1 to {len(CHECKS)}", file=sys.stderr)
        return 2
    print("| # | check | expected | shown | verdict |\n|---|---|---|---|---|", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for number in named or every:
            expected, check = CHECKS[int(number) - 1]
            try:
                shown = check(scratch)
            except Exception as error:  # Whatever it is, the other checks are worth running.
                shown = Shown(" ".join(f"{type(error).__name__}: {error}".split())[-300:], "FAILED")
            failed |= shown.verdict == "FAILED"
            question = check.__doc__.split("? ")[0].rstrip("?\n") + "?"
            print(
                f"| {number} | {question} | {expected} | {shown.text} | {shown.verdict} |",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
