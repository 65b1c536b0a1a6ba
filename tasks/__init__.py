"""What a run generates: prompts, latents, text, pixels, stored data and its preprocessing. Not here: training
(trainer), and file readers (utils/data).
"""
