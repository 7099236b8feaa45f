"""From the user's words to the matrices that they mean.

A model is surveyed once; presets, patterns and fused projections are then resolved by its structure and names. This
room reads the model and changes nothing.
"""
