"""Prefix tuning (Li and Liang 2021): trained keys and values before those of every attention.

``config`` holds the arguments, ``sites`` finds the attention blocks and the sizes of their heads, ``layer`` adds the
prefix where a block calls ``F.scaled_dot_product_attention``, ``multihead`` in ``nn.MultiheadAttention``, whose kernel
cannot be reached in that way. No weight and no cache is changed, so positions of tokens stay.
"""
