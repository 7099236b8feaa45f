"""One class for each method of fine-tuning: all that a run asks of it.

``base`` states the questions, ``lora`` answers them for LoRA by the verbs of the room ``model``. A run of a Trainer
knows only :class:`lightning_lora.methods.base.Method`; a new method is a new file here and a callback in ``trainer``.
"""
