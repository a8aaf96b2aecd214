"""A standalone Flink cluster with Beam's job server and Python workers, all on 127.0.0.1.

    python -m tests.engines.flink DIRECTORY

starts it, prints the flags that a stage needs, and stops all of it on ^C. Everything that it
writes lies in DIRECTORY. `make test-flink` fetches what it runs: a Flink distribution and the
jars of Beam's runner. What Flink is told stands in flink_configuration.py.
"""

import pathlib

from tests.engines import cluster, flink_configuration
from tests.engines.processes import HOST, distribution, free_ports


class FlinkCluster(cluster.Cluster):
    """Its workers are task managers, of two slots each."""

    def __init__(self, directory: pathlib.Path):
        """Takes an empty or new directory for configuration, logs and scratch files."""
        super().__init__(directory)
        self._place = distribution("flink")
        rpc_port, blob_port = free_ports(2)
        flink_configuration.write(
            self.conf,
            scratch=self.scratch,
            rpc_port=rpc_port,
            rest_port=self.page_port,
            blob_port=blob_port,
            num_slots=2,  # A job of two still has room when one task manager is gone.
        )

    def flags(self) -> list[str]:
        """What a stage's command needs to run here."""
        return [*super().flags(), f"--flink_master={HOST}:{self.page_port}", "--parallelism=2"]

    def _start(self, name: str, main: str, *arguments: str, jars: str = "pyflink/lib") -> None:
        self.start_java(
            name,
            main,
            *arguments,
            jars=self._place / jars,
            flags=[f"-Dlog4j.configurationFile={self.conf / 'log4j.properties'}"],
            FLINK_CONF_DIR=str(self.conf),
        )

    def start_engine(self) -> None:
        """Starts job manager and job server."""
        main = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self._start("job-manager", main, f"--configDir={self.conf}")
        self._start(
            "job-server",
            "org.apache.beam.runners.flink.FlinkJobServerDriver",
            f"--flink-master={HOST}:{self.page_port}",
            f"--flink-conf-dir={self.conf}",
            *self.job_server_flags(),
            jars="job-server",
        )

    def start_worker(self, number: int) -> None:
        """Starts a task manager; again, if the one of that number was killed."""
        main = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
        self._start(f"worker-{number}", main, f"--configDir={self.conf}")

    def num_workers(self) -> int:
        """How many task managers the job manager knows."""
        return self.page("/overview")["taskmanagers"]

    def jobs(self) -> list[str]:
        """State of each job there was."""
        return [job["status"] for job in self.page("/jobs")["jobs"]]


if __name__ == "__main__":
    cluster.main("flink", FlinkCluster)
