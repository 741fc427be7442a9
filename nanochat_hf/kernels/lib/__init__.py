"""What several kernels share: Hopper's products, cuDNN's graphs, rotation, weights and their sums. Nothing here is an operation."""
