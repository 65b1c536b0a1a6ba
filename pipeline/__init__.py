"""Rollouts and samplers: how a network's passes become a sample, in training and inference alike. Not here: losses
(model), and loading what is sampled (generation).
"""
