"""Training configurations: each file's get_config() returns a locked ml_collections.ConfigDict."""

import os


def path(name: str) -> str:
    """Path of the config file `name` as it is installed."""
    return os.path.join(os.path.dirname(__file__), name)
