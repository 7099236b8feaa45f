"""Frozen weights that are stored in fewer bits than a matrix has.

The fused ops take a ``weight`` in place of W0. The other files compute the matrix of one format each.
"""
