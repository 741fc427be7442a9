"""The machine below a run: device, precision, processes, compilation, and everything that only XLA needs."""
