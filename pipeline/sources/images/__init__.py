"""Parts of reading images: opening within bounds, the number of frames, scaling."""
