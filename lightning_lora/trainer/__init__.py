"""One run of a Lightning Trainer over an adapted module: the callback, its checkpoints, optimizers and strategies.

``checkpointing`` is what files hold and how a run writes and reads them, ``watching`` is what it checks in its first
steps, ``strategies`` is what each strategy needs. Only this room imports Lightning.
"""
