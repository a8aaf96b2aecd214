"""Which records a step sees, and where the records lie."""
