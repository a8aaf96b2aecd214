"""How a Beam pipeline is run: its options, in this process, or on a cluster.

The pipelines themselves are in datasets/building and embeddings.
"""
