"""Compares an export with another: how its rows changed, how their distributions drifted."""
