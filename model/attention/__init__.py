"""Attention of any family's transformer: backends, masks, the KV cache, sparse attention, replay.

Here belongs what every causal DiT shares. A family's layers, sizes and weights do not: they are in model/<family>/.
"""
