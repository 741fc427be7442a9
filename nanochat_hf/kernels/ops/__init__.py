"""The kernels, one file each. dispatch.py finds them by listing this folder; ../README.md says what a file holds."""
