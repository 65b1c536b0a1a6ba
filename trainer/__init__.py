"""Training only: the loop, one file a kind of training, engines, state, and `build.py`, which picks the trainer. Not
here: sampling a finished run (generation), data and prompts (tasks).
"""
