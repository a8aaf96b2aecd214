"""What commands import, imported by the process from which tests/forked.py forks.

No command is among it, since a command defines its flags when it is run.
"""

from pipeline.cli import quiet

quiet.import_beam()
quiet.import_tensorflow()
import sklearn.linear_model  # noqa: E402
import sklearn.manifold  # noqa: E402, F401

import trainer.runs.train  # noqa: E402, F401
