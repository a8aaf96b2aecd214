"""Beam jobs that create a data set from an image set, and append to a finished data set."""
