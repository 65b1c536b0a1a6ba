"""What any training code needs: config, command line, checkpoints, optimizers, parallelism, files. Not here: anything
that knows this project's models, data sets or other projects' formats.
"""
