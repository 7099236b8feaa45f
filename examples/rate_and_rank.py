"""Which learning rate for which rank: the loss over the rate with alpha fixed, and with alpha = r.

`python examples/rate_and_rank.py` takes a few minutes on two CPU cores and shows two ranks. `--full` is for a GPU:
ranks 2, 8, 32 and 128 at six rates, twice. The task is that of findings.py: SmolLM2-135M, rounded to 4 bits by its
package, on Jane Austen's novels, with adapters on query and value.
"""

from __future__ import annotations

import argparse
import sys

from austen_runs import Setting, Study, data_folder, prepare
from recorded_runs import add_arguments, run_missing, storage_of
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

ALPHA = 16
FIXED, EQUAL = f"alpha = {ALPHA} for every rank", "alpha = r (a scale of 1)"


def settings(full: bool, steps: int | None) -> dict[str, list[Setting]]:
    """The runs of both panels."""
    ranks = (2, 8, 32, 128) if full else (2, 32)
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2) if full else (1e-3, 1e-2)
    length = steps or (200 if full else 15)
    return {
        title: [Setting("qv", r, r if title == EQUAL else ALPHA, rate, 0, length) for rate in rates for r in ranks]
        for title in (FIXED, EQUAL)
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "rate_and_rank")
    options = parser.parse_args(arguments)
    set_verbosity_error()
    disable_progress_bar()
    if options.prepare:
        prepare(options.prepare)
        return
    storage = storage_of(options)
    panels = settings(options.full, options.steps)
    wanted = [setting for panel in panels.values() for setting in panel]
    if options.report is None:
        study = Study(data_folder(options.data))
        run_missing(storage.mine(wanted), study.run, storage)


if __name__ == "__main__":
    main(sys.argv[1:])
