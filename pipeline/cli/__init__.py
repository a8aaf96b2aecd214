"""What all commands share: flags, progress, errors, exit status.

The commands themselves are modules of pipeline and trainer.
"""
