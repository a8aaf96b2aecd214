"""Beam's pool of Python workers, heard on 127.0.0.1 alone.

    python -m tests.engines.worker_pool PORT

`python -m apache_beam.runners.worker.worker_pool_main --service_port=PORT` is the same for
a cluster: it listens on every address, since task managers elsewhere are to reach it.
"""

import signal
import sys

import grpc
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from apache_beam.utils import thread_pool_executor


class _Pool(BeamFnExternalWorkerPoolServicer):
    """Stops no worker: each ends by itself when its task manager lets go of it."""

    def StopWorker(self, *_) -> beam_fn_api_pb2.StopWorkerResponse:  # noqa: N802
        # Task managers number their workers each for itself, from 1-1, so in a pool that two
        # share, one's request would stop a worker of the other.
        return beam_fn_api_pb2.StopWorkerResponse()


def main(port: int) -> None:
    """Starts and stops workers, a process each, until this process is killed."""
    server = grpc.server(thread_pool_executor.shared_unbounded_instance())
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(
        _Pool(use_process=True), server
    )
    if not server.add_insecure_port(f"127.0.0.1:{port}"):
        raise SystemExit(f"worker pool: port {port} is in use; expected a free one")
    server.start()
    print(f"worker pool: 127.0.0.1:{port}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]))
