"""How A and B act in one kind of layer.

Each file adapts one kind by a subclass that replaces the class of the module; the module object, its parameters and
their names stay. ``weight_reads`` and ``source_code`` read the user's code around a layer; no other file looks further
than the layer itself.
"""
