"""One run of a Lightning Trainer over an adapted module: the callback, its checkpoints, optimizers and strategies.

``checkpoints`` is what a file holds and the checks before it is loaded; ``checkpoint_io`` is how a run writes and reads
it. Only this room imports Lightning.
"""
