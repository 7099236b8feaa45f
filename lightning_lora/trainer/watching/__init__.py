"""What is watched in the first steps of a run: that adapters train, and that what is frozen stays as it is.

A watch warns by full names and never changes the run. It is off again where the run ends.
"""
