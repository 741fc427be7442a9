"""Checks of other programs on a saved folder."""
