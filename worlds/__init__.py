"""Toy worlds with known ground truth, and their judges. They stand on utils alone. Not here: how a run trains on them
(tasks).
"""
