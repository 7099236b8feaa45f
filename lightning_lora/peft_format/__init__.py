"""PEFT's directories, ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

``stored`` opens a directory, ``config`` checks the values of its configuration, ``placement`` fits it to a model and
``load`` puts it in; ``contents`` and ``save`` are the reverse. All rules of peft's format are here; peft itself is
never imported.
"""
