"""Kinds of data, one a file, found by their file: a section of a YAML and the task that it describes. Not here: what
several kinds share (tasks), and how a small world draws its samples (worlds).
"""
