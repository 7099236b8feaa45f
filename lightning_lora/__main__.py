"""``python -m lightning_lora``: the command line."""

from __future__ import annotations

import sys

from lightning_lora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
