"""The weight's side of the method: layers compute with ``W0 + scale * B A``, summed for neighbours together.

``reading`` is what a layer calls. ``sizes`` says where a sum is faster, ``summed_weight`` when it may be read,
``members`` and ``group`` which weights are summed together, and when.
"""
