"""Reinforcement learning as a source of batches: questions → answers → rewards → weighted rows."""
