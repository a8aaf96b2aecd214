"""Headers of image files: opened within bounds, and the number of frames."""
