"""How a data set is made of an image set, and how a finished one grows. The Beam jobs are here."""
