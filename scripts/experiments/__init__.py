"""Experiments, each a program that compares trainings and writes what it found."""
