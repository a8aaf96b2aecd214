"""Joins a training cluster that a scheduler has started, as one worker of strategy multi_worker.

    python -m trainer.join --hosts=vae-train-{index}.vae-train --num_workers=4 -- --config=FILE …

The trainer's flags follow after --. The scheduler sets the worker's number: JOB_COMPLETION_INDEX
in a Kubernetes Job, SLURM_PROCID under srun; without a scheduler, set --index. This process sets
TF_CONFIG and becomes trainer.main, so signals and exit status are the trainer's.
On one machine, python -m trainer.launch starts all workers.
"""

import json
import os
import re
import sys
from collections.abc import Mapping

from absl import flags

from pipeline.cli import command
from pipeline.cli.errors import UsageError
from pipeline.machine import gpus

_HOSTS = flags.DEFINE_string(
    "hosts",
    None,
    "Hosts of the workers in the order of their numbers, as in a,b,c; or one name with {index}, "
    "which stands for the worker's number.",
)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", None, "Number of workers, if --hosts has {index}.", lower_bound=1
)
_PORT = flags.DEFINE_integer(
    "port",
    2222,
    "Port of the workers; a second worker on a host takes the next port.",
    lower_bound=1,
    upper_bound=65_000,
)
_INDEX = flags.DEFINE_integer(
    "index", None, "Number of this worker, from 0, if no scheduler sets it.", lower_bound=0
)
flags.mark_flag_as_required("hosts")
# Environment variables in which schedulers set the worker's number; the first one set counts.
_INDEX_VARIABLES = ("JOB_COMPLETION_INDEX", "SLURM_PROCID")


def addresses(hosts: str, num_workers: int | None, port: int) -> list[str]:
    """The workers' addresses, in the order of their numbers.

    Args:
      hosts: value of --hosts.
      num_workers: value of --num_workers.
      port: port of the first worker on a host; each further worker takes the next port.

    Raises:
      UsageError: hosts and num_workers contradict each other, or a host name is malformed.
    """
    if "{index}" in hosts:
        if num_workers is None:
            raise UsageError(f"--hosts={hosts}: contains {{index}}; expected --num_workers too")
        names = [hosts.replace("{index}", str(index)) for index in range(num_workers)]
    else:
        names = hosts.split(",")
        if num_workers not in (None, len(names)):
            raise UsageError(
                f"--num_workers={num_workers}: --hosts={hosts} names {len(names)} host(s); leave "
                "--num_workers out, or name as many hosts"
            )
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(
                f"--hosts={hosts}: {name!r} is not a host name; expected names or IPv4 addresses "
                "separated by commas, or one name with {index}; set the port with --port"
            )
    return [f"{name}:{port + names[:i].count(name)}" for i, name in enumerate(names)]


def worker_index(index: int | None, num_workers: int, environment: Mapping[str, str]) -> int:
    """The number of this worker.

    Args:
      index: value of --index; takes precedence over the environment.
      num_workers: number of workers in the cluster.
      environment: environment variables, in which a scheduler may set the number.

    Raises:
      UsageError: the number is unknown or out of range.
    """
    source, text = "--index", "" if index is None else str(index)
    for variable in _INDEX_VARIABLES:
        if not text and environment.get(variable):
            source, text = variable, environment[variable]
    if not text:
        raise UsageError(
            "the number of this worker is unknown: no scheduler has set "
            f"{' or '.join(_INDEX_VARIABLES)}; set --index"
        )
    if not text.isdecimal() or int(text) >= num_workers:
        raise UsageError(
            f"{source}={text}: expected 0 to {num_workers - 1}, since --hosts names {num_workers} "
            "worker(s); start as many workers as --hosts names"
        )
    return int(text)


def run(arguments: list[str]) -> None:
    """Becomes the trainer."""
    if not arguments:
        raise UsageError("no flags for the trainer; expected flags after --, see --help")
    workers = addresses(_HOSTS.value, _NUM_WORKERS.value, _PORT.value)
    index = worker_index(_INDEX.value, len(workers), os.environ)
    cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    program = [sys.executable, "-m", "trainer.main", *arguments, "--config.strategy=multi_worker"]
    environment = {**os.environ, "TF_CONFIG": json.dumps(cluster), **_worker_gpus(workers, index)}
    os.execve(sys.executable, program, environment)


def _worker_gpus(workers: list[str], index: int) -> dict[str, str]:
    """Environment variables with a worker's share of its host's GPUs.

    Empty if the worker is alone on its host, or a scheduler has chosen its GPUs.
    """
    hosts = [address.rpartition(":")[0] for address in workers]
    on_same_host = [number for number, host in enumerate(hosts) if host == hosts[index]]
    if len(on_same_host) == 1 or gpus.VISIBLE in os.environ:
        return {}
    return gpus.environment_of(on_same_host.index(index), len(on_same_host))


def main() -> None:
    """Entry point of `vae-join`."""
    command.run(run, name="join", doc=__doc__, module=__name__, arguments=True)


if __name__ == "__main__":
    main()
