"""The five KL routes against each other: trials, and tables of them."""
