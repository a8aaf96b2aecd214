"""One CSV file: what its first line says, what its columns hold, how its rows are read."""
