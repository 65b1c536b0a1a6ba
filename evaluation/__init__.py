"""Judging videos: suites for toy worlds, Frechet distances and VBench. Not here: making the videos (generation) and
the judges of toy worlds (worlds).
"""
