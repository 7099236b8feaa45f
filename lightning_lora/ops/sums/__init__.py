"""``W0 + scale * B A`` of many layers in a few launches: a batched product for each shape, or Triton kernels for all.

``weight_sums`` gives the sums their graph. ``plan`` and ``sum_kernels`` are for a GPU with Triton, ``batch`` is for
all else.
"""
