"""One run of a Lightning Trainer over an adapted module.

The callback, its checkpoints, optimizers and strategies. This room and ``cli`` are the only ones that may import
Lightning.
"""
