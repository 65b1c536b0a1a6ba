"""The EDM family: a small class-conditional convolutional network on EDM's path. Not here: the preconditioning, which
is the path's (model/path.py), objectives, and anything that another family would need too.
"""
