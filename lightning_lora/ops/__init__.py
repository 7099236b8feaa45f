"""Arithmetic of the method: tensors in, tensors out.

``linear`` is the forward of an adapted linear layer, and the fused files are its fast paths; ``exact_sum`` is the
merge, by an ``exact_product`` in a ``workspace``. No file of this room knows ``nn.Module`` layers, names of modules or
Lightning.
"""
