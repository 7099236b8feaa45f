"""The sections of `speed.py`: a function of the settings that measures, and returns the lines of the result file.

settings   sizes, device, and which side of the equation computes an adapter
timing     windows of steps in turns, host time, the GPU's busy time
rows       what is measured of a row, and the table of a section
bars       what a value is compared with
adapters   the rows of a case: the bound, full fine-tuning, peft, this package
language, images, layers, small, fit, merging, host    the sections, imported when they run
"""
