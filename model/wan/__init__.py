"""The Wan family: geometry and presets, network, cache, weights in and out, codec, text. Not here: objectives, and
anything that another family would need too.
"""
