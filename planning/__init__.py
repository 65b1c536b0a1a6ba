"""Whether a run fits, and what it costs, before it runs. Not here: anything that a real run needs."""
