"""Measurements of speed and memory, one program a subject. Not here: tests of results (tests)."""
