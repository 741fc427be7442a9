"""The engine: a run, its loop, its checkpoints and its schedules."""
