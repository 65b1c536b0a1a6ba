"""Loading a run or a released model and sampling it: videos, streams, ODE pairs, export. Not here: training's own
validation (trainer) and the samplers themselves (pipeline).
"""
