"""Describes the contents of a data set: statistics, duplicate images, warnings, stats.html."""
