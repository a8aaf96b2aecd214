"""What goes wrong on purpose: kills and signals at a chosen place, hostile names, missing locks."""
