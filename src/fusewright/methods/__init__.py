"""The mathematics: one file per published method. Knows tensors; knows nothing of files.

A method measures in rounds, solves, and combines; ``contract`` says how. ``static`` holds the
training-free ones. ``registry`` finds them all, those of other packages too.
"""
