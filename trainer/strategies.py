"""The devices a run uses, as a tf.distribute strategy."""

import json
import os

import ml_collections
import tensorflow as tf

from pipeline import command
from pipeline.errors import UsageError


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


def _cluster() -> tuple[dict[str, list[str]], str, int]:
    """What TF_CONFIG says: task type -> addresses, and the type and number of this process.

    Raises:
      UsageError: TF_CONFIG is absent or malformed.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        value = json.loads(text)
        cluster = {kind: list(addresses) for kind, addresses in value["cluster"].items()}
        kind, number = value["task"]["type"], int(value["task"]["index"])
        cluster[kind][number]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(
            f"TF_CONFIG={text!r}: expected "
            '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}} for '
            "strategy multi_worker; python -m trainer.launch sets it for workers on one machine"
        ) from error
    return cluster, kind, number


def is_chief() -> bool:
    """Whether this process is the one worker of its cluster that writes.

    Raises:
      UsageError: TF_CONFIG is absent or malformed.
    """
    cluster, kind, number = _cluster()
    return number == 0 and (kind == "chief" or "chief" not in cluster)


def make(config: ml_collections.ConfigDict) -> tf.distribute.Strategy:
    """The strategy that a config asks for.

    Args:
      config: strategy and num_virtual_devices.

    Returns:
      MirroredStrategy over all GPUs, else over the CPU or its parts; OneDeviceStrategy
      on the first of these for `one_device`; for `multi_worker` the same over all processes
      that TF_CONFIG names, once all of them are there.
    """
    reduction = None  # TensorFlow's choice: NCCL between GPUs.
    if config.num_virtual_devices:
        devices = _virtual_cpus(config.num_virtual_devices)
        # Parts of one CPU share its memory. The default would open a collective group, of
        # which a process can have only one size.
        reduction = tf.distribute.ReductionToOneDevice()
    if config.strategy == "multi_worker":
        addresses = [address for of_kind in _cluster()[0].values() for address in of_kind]
        # TensorFlow's channels take gRPC's default, which is the proxy of the environment.
        command.reach_directly(address.rpartition(":")[0].strip("[]") for address in addresses)
        return tf.distribute.MultiWorkerMirroredStrategy()
    if not config.num_virtual_devices:
        gpus = tf.config.list_logical_devices("GPU")
        devices = [f"GPU:{number}" for number in range(len(gpus))] or ["CPU:0"]
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction)
