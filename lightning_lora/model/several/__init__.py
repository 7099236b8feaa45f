"""Several adapters on one model: which of them act, one that goes while the others stay, a new one that combines them.

Each is known by its name; a model that has only one needs nothing of this.
"""
