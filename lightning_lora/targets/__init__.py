"""From the user's words to the matrices that they mean.

Presets, patterns and fused projections are resolved on a model by its structure and names. This room reads the model
and changes nothing.
"""
