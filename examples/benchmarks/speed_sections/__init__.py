"""The sections of `speed.py`: each is a function of the settings, and returns the lines of the result file.

What they share:

    settings         the options of a call, and which side of the equation computes an adapter
    timing           windows of steps in turns, the host's time, the GPU's busy time
    training         a model of random weights, and a step of AdamW
    adapters         one setting as rows: the bound, full fine-tuning, peft, this package
    rows             what is measured of each row
    bars             what a value is compared with
    comparison       the table of a section, and its bars
    decoders, small_models, lightning_runs    models, and runs of a Trainer

The sections are in language, images, layers, small, fit, before_and_after, host and merging. A file is imported when
its section runs, so that a machine needs only the packages of that section.
"""
