"""What a callback reads in each batch, and sets for the time of its step.

It is set before the step of the module, in training and in evaluation, and holds until the batch ends.
"""
