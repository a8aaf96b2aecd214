"""The records and the noise of a step, and where the records are stored."""
