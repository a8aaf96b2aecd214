"""What stored arrays mean: axes, values of pixels, labels, and the names that pair them.

What is unambiguous is read, and a note says how. Anything else is refused with a remedy.
"""
