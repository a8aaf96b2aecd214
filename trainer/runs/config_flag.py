"""A config by the name of its file: which file that is, and whether its config has the right keys.

config.py checks the values.
"""

import os
import pkgutil
import sys

import ml_collections
from absl import flags
from ml_collections.config_flags import config_flags

import configs
from pipeline.cli import flag_parsing
from pipeline.cli.errors import UsageError

# The flag is one of the command's, in --help too, and not of this module.
flags.disclaim_key_flags()


class _Parser(config_flags.ConfigFileFlagParser):
    def parse(self, path: str) -> ml_collections.ConfigDict:
        """The locked config of `FILE` or `NAME`, with or without `:ARGUMENT`.

        Raises:
          ValueError: there is no such file, or its config lacks keys or has unknown ones.
          OSError: the file cannot be read.
        """
        place, colon, argument = path.partition(":")
        if not place.endswith(".py") and os.sep not in place:
            place = os.path.join(os.path.dirname(configs.__file__), f"{place}.py")
        if not os.path.exists(place):
            names = ", ".join(module.name for module in pkgutil.iter_modules(configs.__path__))
            raise ValueError(f"no such config; expected a path to a .py file, or one of {names}")
        config = super().parse(place + colon + argument)
        if not hasattr(config, "lock"):  # Raises the OSError of a file that cannot be read.
            raise ValueError(
                f"get_config() returned a {type(config).__name__}; expected a "
                "ml_collections.ConfigDict"
            )
        check_keys(config)
        return config


def check_keys(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError if a config lacks keys or has unknown ones."""
    keys = configs.default().keys()
    if missing := ", ".join(key for key in keys if key not in config):
        raise ValueError(
            f"get_config() returned a config without {missing}; expected all keys of "
            "configs/mnist.py: let it begin with `from configs import default`, "
            "`config = default()`"
        )
    if unknown := ", ".join(key for key in config if key not in keys):
        raise ValueError(
            f"get_config() returned a config with {unknown}; expected only keys of "
            "configs/mnist.py: remove or rename these"
        )


def load(place: str) -> ml_collections.ConfigDict:
    """The locked config of `FILE` or `NAME`, with or without `:ARGUMENT`, as of the flag.

    Raises:
      UsageError: there is no such file, it fails, or its config lacks keys or has unknown ones.
    """
    # ml_collections runs each file in this module, where the last file's get_config may still be.
    sys.modules.pop("config_config", None)
    try:
        return _Parser("config").parse(place)
    except (TypeError, ValueError) as error:  # With the traceback of an error in the file.
        raise UsageError(f"--config={place}: {str(error).strip().splitlines()[-1]}") from error
    except AttributeError as error:
        raise flag_parsing.unknown_key(error) from error
    except (Exception, SystemExit) as error:
        raise flag_parsing.config_failure(error) from error


def define(default: str | None, text: str) -> flags.FlagHolder:
    """Defines --config and --config.KEY for each key of the config.

    Args:
      default: path of the file that is taken without the flag; None if there is none.
      text: what --help says of the flag.
    """
    holder = config_flags.DEFINE_config_file("config", default, text)
    flags.FLAGS["config"].parser = _Parser("config")
    return holder
