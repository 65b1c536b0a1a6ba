"""Readers of stored samples, and their order over ranks and resumes. Not here: what a run makes of them (tasks)."""
