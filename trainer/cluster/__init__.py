"""The workers of a training cluster, how they meet, and the devices of a run."""
