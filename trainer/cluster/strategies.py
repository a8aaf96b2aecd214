"""Chooses the devices of a run, as a tf.distribute strategy."""

import contextlib
import signal
import threading

import ml_collections
import tensorflow as tf

from pipeline.cli import proxies
from pipeline.cli.errors import UsageError
from trainer.cluster import rendezvous, tf_config


def _virtual_cpus(count: int) -> list[str]:
    """Splits the CPU into `count` devices; TensorFlow allows this once in a process."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = tf.config.get_logical_device_configuration(cpu) or [None]
    if len(devices) < count:
        try:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        except RuntimeError as error:
            raise UsageError(
                f"--config.num_virtual_devices={count}: this process has already started "
                f"TensorFlow with {len(devices)} CPU device(s); expected at most {len(devices)}; "
                "start a new process"
            ) from error
    return [f"CPU:{number}" for number in range(count)]


def is_chief() -> bool:
    """Whether this process is the chief, the only worker of its cluster that writes files.

    Raises:
      UsageError: TF_CONFIG is absent or malformed.
    """
    return tf_config.read().index == 0


def _let_memory_grow() -> None:
    """Lets TensorFlow allocate GPU memory as needed; call it before the first use of a device."""
    for gpu in tf.config.list_physical_devices("GPU"):
        # Earlier code of this process has used the GPU or divided it; its choice stays.
        with contextlib.suppress(RuntimeError, ValueError):
            tf.config.experimental.set_memory_growth(gpu, True)


def _multi_worker() -> tf.distribute.Strategy:
    """The strategy of a cluster; waits for all of its workers."""
    rendezvous.start()
    # TensorFlow's channels use gRPC's default, which is the proxy of the environment.
    proxies.reach_directly(worker.host for worker in tf_config.read().workers)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options = None
    if tf.config.list_physical_devices("GPU"):
        # By default TensorFlow sums over gRPC, which leaves the GPUs of several hosts nearly idle:
        # https://github.com/tensorflow/tensorflow/issues/50178.
        options = tf.distribute.experimental.CommunicationOptions(
            # No timeout_seconds: each sum would start a thread for that time. TensorFlow's
            # coordination service notices lost workers.
            implementation=tf.distribute.experimental.CommunicationImplementation.NCCL,
        )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # TensorFlow's server has replaced the handler.
    return strategy


def make(config: ml_collections.ConfigDict) -> tf.distribute.Strategy:
    """The strategy of a config.

    Args:
      config: strategy and num_virtual_devices.

    Returns:
      `mirrored`: MirroredStrategy over all GPUs, or over the CPU or its virtual devices;
      `one_device`: OneDeviceStrategy on the first of these devices;
      `multi_worker`: MultiWorkerMirroredStrategy over all processes of TF_CONFIG, once they run.

    Raises:
      UsageError: TF_CONFIG is malformed, or num_virtual_devices comes too late in this process.
      Interrupted: a worker ended that had joined before.
    """
    _let_memory_grow()
    reduction = None  # TensorFlow's choice: NCCL between GPUs.
    if config.num_virtual_devices:
        devices = _virtual_cpus(config.num_virtual_devices)
        # Virtual devices of one CPU share its memory. The default would open a collective group,
        # and all groups of a process must have the same size.
        reduction = tf.distribute.ReductionToOneDevice()
    if config.strategy == "multi_worker":
        return _multi_worker()
    if not config.num_virtual_devices:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [f"GPU:{number}" for number in range(len(gpus))] or ["CPU:0"]
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)
