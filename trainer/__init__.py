"""Fits a variational autoencoder to a data set of TFRecord shards.

Imports nothing of Beam; a published model directory is all that it shares with export.
"""
