"""Tools that a model may use: a calculator, and a sandbox for the Python it writes."""
