"""What a run's YAML may say, and how it is read and checked. Here: the schema, its checks, one YAML a recipe. Not
here: sections with an owner (they lie beside it), and what a run does with a config.
"""
