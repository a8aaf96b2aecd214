"""Local paths and URLs behind one set of functions: files, trees, locks, a cache.

What stands in the files is not known here.
"""
