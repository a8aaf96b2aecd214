"""Image sets to TFRecord shards, and shards with a model to embeddings.

Nothing here imports the trainer; tests/test_house.py lists what the trainer may import.
"""
