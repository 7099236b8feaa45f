"""The checkpoints of a run: what one holds, how it is written and read, and what a run starts from or leaves as files.

A file holds adapters alone unless the user asks for more. Nothing is loaded in part, and nothing before it was checked.
"""
