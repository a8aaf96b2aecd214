"""A worker process of the in-process runner's multi_processing mode, without its chatter.

Beam's own worker main logs its every step to the terminal that it shares with
the command; what fails is raised in the command, by way of the runner.
"""

import logging

logging.disable(logging.CRITICAL)  # Before the import, which warns too.

import sys  # noqa: E402

from apache_beam.runners.worker import sdk_worker_main  # noqa: E402

if __name__ == "__main__":
    sdk_worker_main.main(sys.argv)
