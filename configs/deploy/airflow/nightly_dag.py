"""The nightly job in Airflow 3: preprocess --append and export, each behind its gate.

Put this file into the DAGs folder; edit _SCRIPT, and edit _ENVIRONMENT as the comment at the top of
nightly.sh says. Each stage is a task. After status 75 Airflow tries again, and the stage resumes
from its completed files. Any other status but 0 fails the task at once, because a retry would fail
again. Status 3 means that a gate rejected the data set or the export; `latest` names the export
before.
"""

import os

import pendulum
from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

_SCRIPT = "/opt/vae-pipeline/configs/deploy/nightly/nightly.sh"
_ENVIRONMENT = {
    "SOURCE": "idx:/data/incoming",
    "DATA_DIR": "/data/shards",
    "MODEL_DIR": "/data/run/export",
    "EXPORTS_DIR": "/data/embeddings",
    "REQUIRE": "elbo>-110",
    "REQUIRE_DATA": "min_class_share>=0.02",
    "REFERENCE_DATA": "/data/shards",
    "PYTHON": "/opt/vae-pipeline/.venv/bin/python",
    "TRIES": "1",  # Airflow shows its own `retries`.
}
_INTERRUPTED = 75
_MEANINGS = {2: "bad usage or configuration", 3: "the gate rejected its output"}


def _date(context):
    """The night's own date, also for a try after midnight.

    A run that was started without a logical date has the date after which it may run.
    """
    run = context["dag_run"]
    return (run.logical_date or run.run_after).strftime("%Y-%m-%d")


class Stage(BaseOperator):
    """Runs a stage of nightly.sh and acts on its exit status."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._hook = SubprocessHook()

    def execute(self, context):
        """Runs the stage with the name of the task.

        Raises:
          AirflowException: the stage was interrupted; Airflow tries again.
          AirflowFailException: the stage failed; a retry would fail again.
        """
        environment = {**os.environ, **_ENVIRONMENT, "DATE": _date(context)}
        status = self._hook.run_command([_SCRIPT, self.task_id], env=environment).exit_code
        if status == _INTERRUPTED:
            raise AirflowException(f"{self.task_id} was interrupted, or another night is running")
        if status:
            meaning = _MEANINGS.get(status, "it failed")
            raise AirflowFailException(f"{self.task_id}: status {status}, {meaning}; see its log")

    def on_kill(self):
        """Sends SIGTERM to the stage, which keeps its completed files."""
        self._hook.send_sigterm()


with DAG(
    dag_id="vae_nightly",
    schedule="30 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1),
    catchup=False,  # A night processes all new records, so the next one makes up for a missed one.
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": pendulum.duration(minutes=1)},
):
    Stage(task_id="preprocess") >> Stage(task_id="export")
