"""Linear layers whose frozen weight is quantized by another library.

``formats`` is the only file that knows how a library stores a weight. No library is imported: a layer is recognized by
the name of the library that defines its class.
"""
