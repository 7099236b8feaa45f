"""How A and B act in one kind of layer.

Each file adapts one kind (linear, convolution, attention, ...) by a sub-class that replaces the class of the module;
the module object, its parameters and their names stay. ``registry`` says which class adapts which layer, and why a
layer cannot be adapted. A file here looks at one layer, never at the model around it.
"""
