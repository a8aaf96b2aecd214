"""The model and what it minimises: networks, likelihoods, losses, weights."""
