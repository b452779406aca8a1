"""Running requests: files of them, and what they cost in time."""
