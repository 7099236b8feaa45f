"""Batches whose samples use different adapters, in one layer.

``terms`` adds to the output of a layer that has a batch. ``experts`` calls the code of a layer once for each choice of
its samples. What has neither takes one choice for the whole batch.
"""
