"""Video sparse attention (arXiv 2505.13389): tiles of tokens, and one function in several backends (see attention.py).

What belongs here knows tensors and grids of tokens only. When a network uses it is in model/attention/sparse.py.
"""
