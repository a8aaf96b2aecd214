"""What makes a stage safe to kill: its manifest, its tasks, its output directory.

Records that cannot be had are listed here too. What a stage computes is not known here.
"""
