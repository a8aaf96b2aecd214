"""Parquet files of image sets: which belong together, their columns, and the values in them."""
