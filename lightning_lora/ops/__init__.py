"""Arithmetic of the method: tensors in, tensors out.

No file of this room knows ``nn.Module`` layers, names of modules or Lightning. Layers call one function for the forward
of a linear layer, :func:`lightning_lora.ops.linear.linear`.
"""
