"""A training run from its config to the published model: the loop, its state, its metrics.

What one step computes is in steps/.
"""
