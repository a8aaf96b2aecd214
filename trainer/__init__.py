"""Trains a variational autoencoder on a data set of TFRecord shards, and publishes the model.

Does not import Beam. Export reads the published model directory, and nothing else of training.
"""
