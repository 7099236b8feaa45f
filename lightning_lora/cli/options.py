"""The parser of the command ``lightning-lora``: its sub-commands, their options and their help."""

from __future__ import annotations

from collections.abc import Callable

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from lightning_lora.config import PRESETS
from lightning_lora.version import __version__


def make_parser() -> ArgumentParser:
    """The parser of the whole command."""
    parser = ArgumentParser(
        prog="lightning-lora",
        version=__version__,
        description="Tools for LoRA adapters and the models they belong to, in safetensors files. No model is loaded: "
        "tensors are read one after the other, so that memory does not grow with the model.",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (add, words, description) in PARSERS.items():
        command = ArgumentParser(description=f"{words}. {description}")
        add(command)
        command.add_argument("--json", action="store_true", help="Print the result as JSON, for programs.")
        commands.add_subcommand(name, command, help=f"{words}.")
    return parser


def _add_inspect(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        help="PEFT directory, or one with sub-directories of several adapters; .safetensors file of an "
        "adapter; or .ckpt of a callback of this package.",
    )
    parser.add_argument(
        "--plot",
        type=str | None,
        default=None,
        metavar="FILE",
        help="Draw the norms and singular values of the updates into a .png, .pdf or .svg file; null draws nothing.",
    )
    _add_overwrite(parser)


def _add_merge(parser: ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help="Model: a .safetensors file, or a directory with one or with shards."
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="PEFT directory, or .ckpt of LoRACallback; one or several."
    )
    parser.add_argument("out", metavar="OUT", help="Where to write: a file if BASE is one, else a directory.")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="NUMBER",
        help="Factor of each adapter's update, in the order of the adapters; null means 1 for all.",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="BASE is quantized by bitsandbytes: add to its dequantized weights, and write a model in full precision.",
    )
    _add_overwrite(parser)


def _add_diff(parser: ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help="PEFT directory, .ckpt of LoRACallback, or model.")
    parser.add_argument("second", metavar="B", help="Another one of the same kind.")
    parser.add_argument("--top", type=PositiveInt, default=40, help="How many rows to show; --json gives all.")


def _add_extract(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="Model before fine-tuning: a .safetensors file or a directory.")
    parser.add_argument("tuned", metavar="FINETUNED", help="The same model after it.")
    parser.add_argument("out", metavar="OUT", help="PEFT directory to write.")
    parser.add_argument("--r", type=PositiveInt, default=16, help="Rank of every pair.")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="Module names, globs or re:EXPRESSION; null means every linear layer.",
    )
    _add_overwrite(parser)


def _add_plan(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="config.json of transformers, .safetensors file, or a directory with one."
    )
    parser.add_argument("--r", type=PositiveInt, default=8, help="Rank.")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["attn"],
        metavar="TARGET",
        help=f"Presets ({', '.join(PRESETS)}) or names of modules.",
    )


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help=".ckpt of a Trainer with LoRACallback.")
    parser.add_argument("directory", metavar="DIR", help="PEFT directory to write.")
    parser.add_argument(
        "--name",
        type=str | None,
        default=None,
        metavar="NAME",
        help="The adapter to write, into DIR itself; null writes all, of several each into the sub-directory of its "
        "name.",
    )
    _add_inner(
        parser,
        "Module that peft will wrap, by its name in the LightningModule; null takes the one that holds everything.",
    )
    _add_overwrite(parser)


def _add_import(parser: ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="PEFT directory that this package wrote.")
    parser.add_argument("checkpoint", metavar="CKPT", help=".ckpt to write.")
    _add_inner(parser, "Module that DIR's names are relative to; null takes the one that DIR records.")
    _add_overwrite(parser)


def _add_inner(parser: ArgumentParser, words: str) -> None:
    parser.add_argument("--inner", type=str | None, default=None, metavar="NAME", help=words)


def _add_overwrite(parser: ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="Replace what is there, once the result is complete.")


PARSERS: dict[str, tuple[Callable[[ArgumentParser], None], str, str]] = {
    "inspect": (
        _add_inspect,
        "Show what an adapter's files hold",
        "It prints ranks, scales, sizes, the norm of each layer's update, the base it belongs to and the metadata. "
        "With --plot it also draws the norm and the singular values of each layer's update.",
    ),
    "merge": (
        _add_merge,
        "Add adapters to a model's weights",
        "OUT gets the same files as BASE, with W + scale * B A in place of W, summed in fp32 and rounded once. It "
        "appears only when it is complete. The share of the update that rounding lost is reported. Several adapters "
        "are added at once: `lightning-lora merge BASE fr de OUT --weights 0.7 0.3`. Of a .ckpt that holds several, "
        "`lightning-lora export` makes directories first. For an adapter that was trained on a quantized base, give "
        "as BASE the quantized model, with --dequantize: the result computes what was trained. Or give the model in "
        "full precision that was quantized: its other values change the result, so test it.",
    ),
    "diff": (
        _add_diff,
        "Compare two adapters, or two models",
        "Of adapters the updates B A are compared, not A and B; of several in sub-directories or in a .ckpt each by "
        "its name. The largest differences come first.",
    ),
    "extract": (
        _add_extract,
        "Make an adapter of a full fine-tune",
        "A truncated SVD gives the update of rank r that is nearest to the change of each linear layer; the share of "
        "the change that it keeps is reported. Changes of biases, norms and embeddings are listed and not kept.",
    ),
    "plan": (
        _add_plan,
        "Show what LoRA costs on a model",
        "It prints the trainable parameters, the sizes of checkpoints and the memory in training. From a config.json "
        "transformers builds the model without its values; of a safetensors file only names and shapes are read.",
    ),
    "export": (
        _add_export,
        "Make a PEFT directory of a run's checkpoint",
        "It holds the adapter of linear layers and embeddings in a .ckpt that LoRACallback wrote, and the fingerprint "
        "of their base. Of several adapters each gets a sub-directory. For other layers use "
        "save_adapter(load_from_checkpoint(...), ...) in Python.",
    ),
    "import": (
        _add_import,
        "Make a checkpoint of a PEFT directory",
        "It is for ckpt_path in trainer.test and for load_from_checkpoint. Training starts from the directory itself, "
        "by LoRACallback(init_from=...), which also reads directories that peft wrote.",
    ),
}
