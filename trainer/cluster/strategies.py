"""The devices a run uses, as a tf.distribute strategy."""

import contextlib
import signal

import ml_collections
import tensorflow as tf

from pipeline.cli import proxies
from pipeline.cli.errors import UsageError
from trainer.cluster import rendezvous, tf_config


def _virtual_cpus(count: int) -> list[str]:
    """Splits the CPU into `count` devices; TensorFlow allows it once in a process."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    configured = tf.config.get_logical_device_configuration(cpu) or [None]
    if len(configured) < count:
        try:
            tf.config.set_logical_device_configuration(
                cpu, [tf.config.LogicalDeviceConfiguration()] * count
            )
        except RuntimeError as error:
            raise UsageError(
                f"--config.num_virtual_devices={count}: this process has already started with "
                f"{len(configured)} CPU device(s); expected at most that many: use a new process"
            ) from error
    return [f"CPU:{number}" for number in range(count)]


def is_chief() -> bool:
    """Whether this process is the one worker of its cluster that writes.

    Raises:
      UsageError: TF_CONFIG is absent or malformed.
    """
    return tf_config.read().index == 0


def _let_memory_grow() -> None:
    """Makes TensorFlow take a GPU's memory as it needs it; before it uses the first device."""
    for gpu in tf.config.list_physical_devices("GPU"):
        # Too late, or set for parts of the GPU: whoever used the GPU before has decided.
        with contextlib.suppress(RuntimeError, ValueError):
            tf.config.experimental.set_memory_growth(gpu, True)


def _multi_worker() -> tf.distribute.Strategy:
    """The strategy of a cluster, once all of its workers are there."""
    rendezvous.start()
    # TensorFlow's channels take gRPC's default, which is the proxy of the environment.
    proxies.reach_directly(worker.host for worker in tf_config.read().workers)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options = None
    if tf.config.list_physical_devices("GPU"):
        # Of itself TensorFlow sums over gRPC, which leaves the GPUs of several hosts nearly idle:
        # https://github.com/tensorflow/tensorflow/issues/50178.
        options = tf.distribute.experimental.CommunicationOptions(
            # No timeout_seconds: each sum would start a thread that lives as long. A worker that is
            # gone is noticed by TensorFlow's coordination service.
            implementation=tf.distribute.experimental.CommunicationImplementation.NCCL,
        )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    signal.signal(signal.SIGTERM, on_sigterm)  # TensorFlow's server has put its own there.
    return strategy


def make(config: ml_collections.ConfigDict) -> tf.distribute.Strategy:
    """The strategy that a config asks for.

    Args:
      config: strategy and num_virtual_devices.

    Returns:
      MirroredStrategy over all GPUs, else over the CPU or its parts; OneDeviceStrategy
      on the first of these for `one_device`; for `multi_worker` the same over all processes
      that TF_CONFIG names, once all of them are there.

    Raises:
      UsageError: TF_CONFIG or num_virtual_devices cannot be followed.
      Interrupted: a worker ended that had been there.
    """
    _let_memory_grow()
    reduction = None  # TensorFlow's choice: NCCL between GPUs.
    if config.num_virtual_devices:
        devices = _virtual_cpus(config.num_virtual_devices)
        # Parts of one CPU share its memory. The default would open a collective group, of
        # which a process can have only one size.
        reduction = tf.distribute.ReductionToOneDevice()
    if config.strategy == "multi_worker":
        return _multi_worker()
    if not config.num_virtual_devices:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [f"GPU:{number}" for number in range(len(gpus))] or ["CPU:0"]
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)
