"""Evaluations: bits per byte, CORE, and accuracy on chat tasks."""
