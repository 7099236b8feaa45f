"""Prompt tuning (Lester et al. 2021): trained vectors before the tokens, at the first block or at every block.

``config`` holds the arguments, ``sites`` finds the blocks and what in them would not stand longer sequences, ``layer``
puts the vectors before the input of a block and takes their outputs off, ``arguments`` makes the other arguments of a
block fit: masks and rotations. Tokens keep their positions, since positions are added before the blocks or are given
to them.
"""
