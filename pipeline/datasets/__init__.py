"""TFRecord data sets: where a record goes, and how a finished set is read and verified.

building/ makes and extends a set, profile/ describes one.
"""
