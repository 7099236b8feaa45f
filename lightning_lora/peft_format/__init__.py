"""PEFT's directories, ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

All rules of peft's format are here and nowhere else. peft itself is never imported.
"""
