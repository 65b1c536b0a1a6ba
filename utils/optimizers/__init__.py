"""Kinds of optimizers, one a file; `OptimizerConfig.variants` in utils/optim.py finds them."""
