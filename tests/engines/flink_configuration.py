"""The configuration files of a Flink cluster on 127.0.0.1."""

import json
import pathlib

from tests.engines.processes import HOST

_LOG4J = """\
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = Console
appender.console.name = Console
appender.console.type = CONSOLE
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %-5p %c{1} - %m%n
"""


def write(
    conf: pathlib.Path,
    *,
    scratch: pathlib.Path,
    rpc_port: int,
    rest_port: int,
    blob_port: int,
    num_slots: int,
) -> None:
    """Writes what all processes of a cluster read.

    Args:
      conf: the directory to write.
      scratch: that of Flink's temporary files.
      rpc_port: where the job manager hears task managers.
      rest_port: where it hears everybody else.
      blob_port: where task managers fetch jars from it.
      num_slots: of each task manager.
    """
    settings = {
        "jobmanager.rpc.address": HOST,
        "jobmanager.rpc.port": rpc_port,
        "jobmanager.bind-host": HOST,
        "jobmanager.memory.process.size": "1g",
        "rest.address": HOST,
        "rest.bind-address": HOST,
        "rest.port": rest_port,
        "blob.server.port": blob_port,
        "taskmanager.host": HOST,
        "taskmanager.bind-host": HOST,
        "taskmanager.numberOfTaskSlots": num_slots,
        # Started without Flink's shell scripts, a task manager has to be told each.
        "taskmanager.cpu.cores": 1.0,
        "taskmanager.memory.framework.heap.size": "128m",
        "taskmanager.memory.framework.off-heap.size": "128m",
        "taskmanager.memory.task.heap.size": "512m",
        "taskmanager.memory.task.off-heap.size": "128m",
        "taskmanager.memory.network.min": "64m",
        "taskmanager.memory.network.max": "64m",
        "taskmanager.memory.managed.size": "128m",
        "taskmanager.memory.jvm-metaspace.size": "256m",
        "taskmanager.memory.jvm-overhead.min": "192m",
        "taskmanager.memory.jvm-overhead.max": "192m",
        "cluster.evenly-spread-out-slots": True,
        "io.tmp.dirs": scratch,
        # A task manager that is gone is noticed in seconds, and its work done elsewhere.
        "heartbeat.interval": 1000,
        "heartbeat.timeout": 10000,
        "restart-strategy.type": "fixed-delay",
        "restart-strategy.fixed-delay.attempts": 4,
        "restart-strategy.fixed-delay.delay": "1 s",
        # Each job loads the runner's classes anew; a leaked one is no reason to fail.
        "classloader.check-leaked-classloader": False,
    }
    lines = [f"{key}: {json.dumps(value, default=str)}\n" for key, value in settings.items()]
    (conf / "config.yaml").write_text("".join(lines))
    (conf / "log4j.properties").write_text(_LOG4J)
