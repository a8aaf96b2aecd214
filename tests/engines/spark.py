"""A standalone Spark cluster with Beam's job server and Python workers, all on 127.0.0.1.

    python -m tests.engines.spark DIRECTORY

starts it, prints the flags that a stage needs, and stops all of it on ^C. Everything that it
writes lies in DIRECTORY. `make test-spark` fetches the jars that it runs, Spark's and those of
Beam's runner: spark.pom.xml names them.
"""

import pathlib
import shlex

from tests.engines import cluster
from tests.engines.processes import HOST, JAVA_FLAGS, distribution, free_ports


class SparkCluster(cluster.Cluster):
    """Its workers have a core each; the job server is the driver of its jobs."""

    def __init__(self, directory: pathlib.Path):
        """Takes an empty or new directory for logs and scratch files."""
        super().__init__(directory)
        self._place = distribution("spark")
        [self._port] = free_ports(1)
        self._master = f"spark://{HOST}:{self._port}"

    def flags(self) -> list[str]:
        """What a stage's command needs to run here."""
        # Executors have the job server's jars already; a job that names none brings them all.
        [one] = (self._place / "jars").glob("beam-runners-spark-3-*.jar")
        return [*super().flags(), f"--files_to_stage={one}"]

    def _start(self, name: str, main: str, *arguments: str, **settings: str) -> None:
        self.start_java(
            name,
            main,
            *arguments,
            jars=self._place / "jars",
            flags=[f"-Dspark.{key.replace('_', '.')}={value}" for key, value in settings.items()],
            # By these a worker finds what its executors run.
            SPARK_HOME=str(self._place),
            SPARK_SCALA_VERSION="2.12",
            SPARK_LOCAL_IP=HOST,
        )

    def start_engine(self) -> None:
        """Starts master and job server."""
        self._start(
            "master",
            "org.apache.spark.deploy.master.Master",
            *("--host", HOST, "--port", str(self._port), "--webui-port", str(self.page_port)),
        )
        self._start(
            "job-server",
            "org.apache.beam.runners.spark.SparkJobServerDriver",
            f"--spark-master-url={self._master}",
            *self.job_server_flags(),
            driver_host=HOST,
            ui_enabled="false",
            executor_memory="512m",
            executor_extraJavaOptions=shlex.join(JAVA_FLAGS),
        )

    def start_worker(self, number: int) -> None:
        """Starts a worker; again, if the one of that number was killed."""
        work_dir = str(self.scratch / f"worker-{number}")
        self._start(
            f"worker-{number}",
            "org.apache.spark.deploy.worker.Worker",
            *("--host", HOST, "--cores", "1", "--memory", "1g", "--webui-port", "0"),
            *("--work-dir", work_dir, self._master),
        )

    def num_workers(self) -> int:
        """How many workers the master knows."""
        return self.page("/json/")["aliveworkers"]

    def jobs(self) -> list[str]:
        """State of each application there was."""
        page = self.page("/json/")
        return [app["state"] for app in (*page["activeapps"], *page["completedapps"])]


if __name__ == "__main__":
    cluster.main("spark", SparkCluster)
