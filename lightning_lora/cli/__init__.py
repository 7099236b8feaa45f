"""The command ``lightning-lora``, which works on files; no weight of a model is held in memory longer than needed.

A sub-command has a file of its name (``convert`` is ``export`` and ``import``); ``main``, ``options``, ``reports`` and
``output`` are for all of them. The others answer questions about a model from its files: names, shapes, costs.
"""
