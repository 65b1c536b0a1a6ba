"""Parallelism outside the model: the mesh, sharding, and what else spreads a network over processes. Not here: the
planner (planning).
"""
