"""One module for each kind of image set; pipeline/sources/__init__.py lists the kinds."""
