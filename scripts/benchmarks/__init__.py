"""Benchmarks, one file each.

python -m scripts.bench NAME.
"""
