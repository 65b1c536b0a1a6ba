"""Training only: the loop, one file a kind of training, engines, state, and `build.py`, which puts a run together. Not
here: sampling a finished run (generation), data and prompts (tasks).
"""
