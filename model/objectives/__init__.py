"""Objectives, one class a file, found by their file.

Here belongs what a student can be trained on: a class, its config, and what it draws. The mathematics is in the pure
functions of model/, and the discriminator's training is in trainer/.
"""
