"""Runs Beam pipelines: in this process, in worker processes, or on a cluster.

The pipelines themselves are in datasets/building and embeddings.
"""
