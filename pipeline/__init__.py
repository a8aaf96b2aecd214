"""Image sets to TFRecord shards, and shards with a model to embeddings.

The trainer may import `arithmetic`, `command`, `errors`, `examples`, `progress`, `shards`,
`stage` and `storage` from here; nothing here imports the trainer.
"""
