"""What a run's YAML may say, and how it is read and checked. Here: the schema, its checks, one YAML a recipe. Not
here: sections of other rooms (each is defined beside its owner), and what a run does with a config.
"""
