"""Arithmetic of the method: tensors in, tensors out.

Here is ``W0 x + scale * B A x`` as formulas, autograd functions and Triton kernels, and the exact sum of a merge. No
file of this room knows ``nn.Module`` layers, names of modules or Lightning.
"""
