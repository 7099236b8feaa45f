"""Bytes on disk: safetensors, JSON and atomic writes.

Files are read as from a stranger and written whole or not at all. Functions take paths and tensors, never a module, and
know nothing of PEFT or of Lightning checkpoints.
"""
