"""What makes a stage safe to kill: its manifest, its tasks, its output directory.

Quarantined records are listed here too. What a stage computes stands elsewhere.
"""
