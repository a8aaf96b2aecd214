"""report.html of an export, with its plots and its files for the Embedding Projector."""
