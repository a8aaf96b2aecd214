"""Which directories of a folder of images are splits, and which are classes."""
