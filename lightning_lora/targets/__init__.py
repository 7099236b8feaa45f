"""From the user's words to the matrices that they mean.

A model is surveyed once: its modules, all their names, and who shares a parameter. Presets, patterns and fused
projections are then resolved by its structure and names. This room reads the model and changes nothing.
"""
