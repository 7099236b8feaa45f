"""How A and B act in one kind of layer.

Each file adapts one kind by a subclass that replaces the class of the module; the module object, its parameters and
their names stay. A file of this room looks at one layer, never at the model around it.
"""
