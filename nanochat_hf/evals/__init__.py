"""Evaluations: bits per byte, and chat tasks."""
