"""The commands: each parses its flags, builds what they name, and starts it."""
