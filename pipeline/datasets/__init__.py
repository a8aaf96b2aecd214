"""TFRecord data sets: the placement of records, and reading and verifying a finished set.

building/ creates a set and appends to it; profile/ describes a set.
"""
