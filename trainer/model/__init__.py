"""The model and its objective: networks, likelihoods, losses, weights."""
