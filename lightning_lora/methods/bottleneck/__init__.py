"""Bottleneck adapters: small MLPs after the sublayers of a model, whose own weights are never touched.

``sites`` chooses the sublayers, ``layer`` computes, ``method`` answers what a run asks. A bottleneck reads and writes
activations only, so it works on quantized weights too, and can never be merged into any.
"""
