"""What several kernels share: products, cuDNN's graphs, rotation, weights and their sums. No operation is here."""
