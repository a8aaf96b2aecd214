"""Trains a variational autoencoder on a data set of TFRecord shards, and publishes the model.

Does not import Beam. Export reads the published model directory, and nothing else of training.
"""

import importlib.util
import os
import sys


def _shadow() -> tuple[str, str] | None:
    """A package of this distribution that another directory hides, and the path that does."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("pipeline", "configs"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        places = [*(spec.submodule_search_locations or ()), spec.origin]
        if not os.path.exists(places[0]) or not os.path.samefile(places[0], f"{home}/{name}"):
            return name, places[0]
    return None


if _found := _shadow():
    _text = (
        f"{_found[1]}: hides the package {_found[0]} of vae-pipeline; expected no other directory "
        "of this name before it on sys.path: python -m puts the working directory first, so run "
        "the console script, such as vae-train, or start in another directory; unset PYTHONPATH "
        "if that names the directory"
    )
    _is_command = sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("vae-")
    if not _is_command:
        raise ImportError(_text)
    print(_text, file=sys.stderr)
    raise SystemExit(2)
