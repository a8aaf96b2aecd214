"""What every command does alike: flags, progress, errors, exit status.

The commands themselves are modules of pipeline and trainer.
"""
