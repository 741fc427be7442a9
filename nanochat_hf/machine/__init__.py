"""What this machine is and what it is good at."""
