"""Objectives, one a file, and what they share: schedule, scores, types, averages. Not here: how networks are built,
wrapped or trained (trainer), and rollouts (pipeline).
"""
