"""Who takes part in training, and on which devices: replicas, workers, how workers meet."""
