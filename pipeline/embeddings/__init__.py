"""Shards and a model to rows and pictures, and whether these may be published.

The report of an export is in reports/.
"""
