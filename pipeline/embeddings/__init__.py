"""Computes the rows and pictures of an export from shards and a model, and gates publication.

The report of an export is in reports/.
"""
