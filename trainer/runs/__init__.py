"""A training run from its config to the published model: the loop, its state, its metrics.

The computation of one step is in steps/.
"""
