"""Joins a training cluster that a scheduler has started, as one worker of strategy multi_worker.

    python -m trainer.join --hosts=vae-train-{index}.vae-train --num_workers=4 -- --config=FILE …

What stands after -- are the trainer's flags. The worker's number is the scheduler's word:
JOB_COMPLETION_INDEX in a Job of Kubernetes, SLURM_PROCID under srun, else --index. This process
sets TF_CONFIG and becomes trainer.main, so signals and the exit status are the trainer's.
On one machine python -m trainer.launch does all that.
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
    "Hosts of the workers in the order of their numbers, a,b,c; or one with {index} in it, which "
    "stands for the number.",
)
_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", None, "How many workers there are, where --hosts has {index}.", lower_bound=1
)
_PORT = flags.DEFINE_integer(
    "port",
    2222,
    "Port of the workers; the second on one host takes the next.",
    lower_bound=1,
    upper_bound=65_000,
)
_INDEX = flags.DEFINE_integer(
    "index", None, "Number of this worker, from 0, where no scheduler says it.", lower_bound=0
)
flags.mark_flag_as_required("hosts")
# Who says which worker this is, in the order in which they are asked.
_SCHEDULERS = ("JOB_COMPLETION_INDEX", "SLURM_PROCID")


def addresses(hosts: str, num_workers: int | None, port: int) -> list[str]:
    """The workers' addresses, in the order of their numbers.

    Args:
      hosts: as --hosts.
      num_workers: as --num_workers.
      port: of the first worker on a host; each further one takes the next.

    Raises:
      UsageError: hosts and num_workers don't go together.
    """
    if "{index}" in hosts:
        if num_workers is None:
            raise UsageError(f"--hosts={hosts}: has {{index}} in it; expected --num_workers too")
        names = [hosts.replace("{index}", str(index)) for index in range(num_workers)]
    else:
        names = hosts.split(",")
        if num_workers not in (None, len(names)):
            raise UsageError(
                f"--num_workers={num_workers}: --hosts={hosts} names {len(names)}; leave it out "
                "or name as many"
            )
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(
                f"--hosts={hosts}: {name!r} is no host name; expected names or IPv4 addresses with "
                "commas between them, or one with {index}; the port is --port"
            )
    return [f"{name}:{port + names[:at].count(name)}" for at, name in enumerate(names)]


def own_index(index: int | None, num_workers: int, environment: Mapping[str, str]) -> int:
    """The number of this worker.

    Args:
      index: as --index.
      num_workers: how many there are.
      environment: where a scheduler says it.

    Raises:
      UsageError: nobody says it, or there are not so many workers.
    """
    said_by, text = "--index", "" if index is None else str(index)
    for variable in _SCHEDULERS:
        if not text and environment.get(variable):
            said_by, text = variable, environment[variable]
    if not text:
        raise UsageError(
            f"which worker is this? expected one of {', '.join(_SCHEDULERS)} from a scheduler; set "
            "--index"
        )
    if not text.isdecimal() or int(text) >= num_workers:
        raise UsageError(
            f"{said_by}={text}: expected 0 to {num_workers - 1}, since --hosts names {num_workers} "
            "worker(s); start as many as it names"
        )
    return int(text)


def run(arguments: list[str]) -> None:
    """Becomes the trainer."""
    if not arguments:
        raise UsageError("no flags for the trainer; expected them after --, as in --help")
    workers = addresses(_HOSTS.value, _NUM_WORKERS.value, _PORT.value)
    index = own_index(_INDEX.value, len(workers), os.environ)
    cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    program = [sys.executable, "-m", "trainer.main", *arguments, "--config.strategy=multi_worker"]
    environment = {**os.environ, "TF_CONFIG": json.dumps(cluster), **_own_gpus(workers, index)}
    os.execve(sys.executable, program, environment)


def _own_gpus(workers: list[str], index: int) -> dict[str, str]:
    """The environment's GPUs of a worker that shares its host, if no scheduler has chosen them."""
    host = workers[index].rpartition(":")[0]
    on_host = [n for n, address in enumerate(workers) if address.rpartition(":")[0] == host]
    if len(on_host) == 1 or gpus.VISIBLE in os.environ:
        return {}
    return gpus.environment_of(on_host.index(index), len(on_host))


def main() -> None:
    """Entry point of `vae-join`."""
    command.run(run, name="join", doc=__doc__, module=__name__, arguments=True)


if __name__ == "__main__":
    main()
