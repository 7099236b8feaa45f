"""Several adapters in one run: which of them each sample uses, and what that means for gradients and rates.

A run with one adapter does not enter this room. Nothing here is kept on the module after the run.
"""
