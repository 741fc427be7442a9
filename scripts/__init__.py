"""Faces of the commands in nanochat_hf/cli, and the benchmarks and experiments, which the package does not ship."""
