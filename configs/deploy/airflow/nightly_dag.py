"""The night's chain in Airflow 3: preprocess --append, then export behind its gate.

Put this file into the DAGs folder; edit _SCRIPT, and _ENVIRONMENT as the head of nightly.sh says.
A task is a stage. Status 75 is tried again, which goes on from the files that are whole; any other
but 0 fails at once, since it would fail again. The gate's refusal is told from other failures by
its message, and what was published before stays.
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
    "OUTPUT_DIR": "/data/embeddings",
    "REQUIRE": "elbo>-110",
    "PYTHON": "/opt/vae-pipeline/.venv/bin/python",
    "TRIES": "1",  # Airflow's own `retries` are shown and can be watched.
}
_INTERRUPTED = 75
_MEANINGS = {2: "bad usage or configuration", 3: "the gate held the export back"}


class Stage(BaseOperator):
    """A stage of nightly.sh, with its exit status honoured."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._hook = SubprocessHook()

    def execute(self, context):
        """Runs the stage that the task is named after.

        Raises:
          AirflowException: it was interrupted; Airflow tries again.
          AirflowFailException: it failed, and would fail again.
        """
        environment = {**os.environ, **_ENVIRONMENT}
        status = self._hook.run_command([_SCRIPT, self.task_id], env=environment).exit_code
        if status == _INTERRUPTED:
            raise AirflowException(f"{self.task_id} was interrupted, or another night runs")
        if status:
            meaning = _MEANINGS.get(status, "it failed")
            raise AirflowFailException(f"{self.task_id}: status {status}, {meaning}; see its lines")

    def on_kill(self):
        """Passes on that the task is to end; the stage keeps what is whole."""
        self._hook.send_sigterm()


with DAG(
    dag_id="vae_nightly",
    schedule="30 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1),
    catchup=False,  # A night takes all that is there, so a missed one is made up for.
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": pendulum.duration(minutes=1)},
):
    Stage(task_id="preprocess") >> Stage(task_id="export")
