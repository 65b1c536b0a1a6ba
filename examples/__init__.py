"""Scripts to copy: each shows one way to use fewstep from Python. Not here: what the commands do already."""
