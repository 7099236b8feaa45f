"""One class for each method of fine-tuning: all that a run asks of it.

``base`` states the questions; ``recorded`` and ``added`` answer what all methods answer alike, by the verbs of the room
``model``. A run of a Trainer knows only :class:`lightning_lora.methods.base.Method`. A new method is a folder here, a
line in ``known`` and a callback in ``trainer``.
"""
