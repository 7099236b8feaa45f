"""Bytes on disk: safetensors, JSON, files of ``torch.save``, and atomic writes.

Files are checked as files of unknown origin, and are written completely or not at all. Functions take paths and
tensors, never a module, and know nothing of PEFT or of Lightning checkpoints.
"""
