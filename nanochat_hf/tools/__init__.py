"""What a chat model may call: a calculator, and Python in a sandbox."""
