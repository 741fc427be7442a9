"""What happens during training beside the steps; each callback owns its cadence."""
