"""The command ``lightning-lora``: one file for each sub-command, which works on files without a model in memory.

Functions here parse options, call the rooms below and print; results are plain data.
"""
