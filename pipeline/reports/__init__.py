"""report.html of an export, with its plots and the bundle for the Embedding Projector."""
