"""LoRA through other people's packages: each trains, restores, predicts, saves and loads by its own code.

One package is tried in one environment, as their requirements contradict one another:

    pip install gluonts lightning_lora
    python examples/benchmarks/packages/run.py gluonts --out packages.md

A row holds a class, the layers that were adapted, and what was compared:

- weights: the module that the package gives back holds ``W0 + scale * B A``, summed here in fp64 from the base before
  the run and from the adapters in the checkpoint that the package restored (the last ones where it restores none);
- frozen: every other entry of the module's state dict is the base's, bit for bit;
- reload: the package's own save and load give equal predictions.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import traceback
import warnings
from pathlib import Path

from forecasting import darts, gluonts, neuralforecast, pytorch_forecasting
from science import chemprop, diffusers, rectools, scvi, x_transformers
from tabular import deeptab, pytorch_tabular
from trial import LIGHTNING, Row

PACKAGES = {
    "chemprop": chemprop,
    "x-transformers": x_transformers,
    "gluonts": gluonts,
    "pytorch_tabular": pytorch_tabular,
    "deeptab": deeptab,
    "pytorch-forecasting": pytorch_forecasting,
    "neuralforecast": neuralforecast,
    "rectools": rectools,
    "darts": darts,
    "scvi-tools": scvi,
    "diffusers": diffusers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trace", action="store_true")
    arguments = parser.parse_args()
    library = "pytorch_lightning" if arguments.package == "rectools" else "lightning.pytorch"
    pl = importlib.import_module(library)
    LIGHTNING["pl"] = pl
    version = importlib.metadata.version(arguments.package)
    lines = []
    for name, targets, trial in PACKAGES[arguments.package]():
        if arguments.only and arguments.only not in name:
            continue
        row = Row(name, str(targets))
        pl.seed_everything(0, verbose=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trial(row, targets)
            except Exception as error:
                if arguments.trace:
                    traceback.print_exc()
                row.notes.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        lines.append(
            f"| {arguments.package} | {version} | {row.name} | {row.targets} | {row.adapted} | {'; '.join(row.notes)} |"
        )
        print(lines[-1], flush=True)
        if arguments.trace:
            for w in caught:
                if "lora" in str(w.message).lower() or "adapt" in str(w.message).lower():
                    print("   W:", " ".join(str(w.message).split())[:400])
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
