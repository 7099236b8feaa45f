"""What a person reads of a model: the plan, the table at the start of a run, and heads that stay frozen.

Nothing here changes a model. Lines fit 80 columns where the names of modules do.
"""
