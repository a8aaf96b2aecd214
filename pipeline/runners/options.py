"""Parses the Beam options among a command's flags."""

import difflib
from collections.abc import Sequence

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.runner import create_runner

from pipeline.cli.errors import UsageError


def parse_options(args: Sequence[str]) -> PipelineOptions:
    """Beam's options from the arguments that are not a command's own flags.

    Raises:
      UsageError: Beam does not know an argument; the message has the nearest name.
    """
    parser = _parser()
    # Beam and argparse have no public list of options; when the private names change,
    # tests/cli/test_command.py fails.
    beam_flags = [option for action in parser._actions for option in action.option_strings]
    _, unknown = parser.parse_known_args(list(args))
    if unknown:
        from absl import flags

        name = unknown[0].split("=", 1)[0]
        own_flags = [f"--{flag}" for flag in flags.FLAGS]
        near = difflib.get_close_matches(name, [*own_flags, *beam_flags], n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else "see --help for this command's flags"
        raise UsageError(f"unknown flag {unknown[0]!r}: neither this command's nor Beam's; {hint}")
    options = PipelineOptions(list(args))
    name = options.view_as(StandardOptions).runner
    try:
        _ = name and create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UsageError(f"--runner={name}: {error}") from error
    direct = options.view_as(DirectOptions)
    if direct.direct_num_workers < 0:
        raise UsageError(
            f"--direct_num_workers={direct.direct_num_workers}: expected at least 1, or 0 for one "
            "worker a core"
        )
    if direct.direct_num_workers != 1 and not any("direct_running_mode" in a for a in args):
        # Beam's default would run a single worker, with a warning.
        direct.direct_running_mode = "multi_processing"
    return options


def _parser():
    """An argument parser with the options of every PipelineOptions class."""
    from apache_beam.options import pipeline_options

    def refuse(message: str) -> None:
        raise UsageError(f"Beam option: {message}")

    parser = pipeline_options._BeamArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = refuse  # Instead of two screens of usage.
    for options_class in {str(c): c for c in PipelineOptions.__subclasses__()}.values():
        options_class._add_argparse_args(parser)
    return parser
