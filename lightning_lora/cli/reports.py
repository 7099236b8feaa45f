"""The results of the commands, as text for people and as plain data for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lightning_lora.cli.costs import ACCOUNTINGS, ADAPTER
from lightning_lora.model.report.table import bytes_text
from lightning_lora.names import counted, folded

if TYPE_CHECKING:  # a command imports what it needs and no other command
    from lightning_lora.cli.convert import Exported
    from lightning_lora.cli.diff import Difference, Differences
    from lightning_lora.cli.extract import Extraction
    from lightning_lora.cli.inspect import Inspection
    from lightning_lora.cli.merge import MergeReport
    from lightning_lora.cli.plan import PlannedCosts

QUANTIZED = (
    "The adapter was trained on a quantized base, whose values it does not record: for {count} of BASE only names and "
    "shapes were compared."
)
OTHER_VALUES = " The values of BASE may differ from those that were trained on, so test the merged model."
LISTED = 20  # rows of a list that has no limit of its own


def layers_text(count: int) -> str:
    """``1 adapted layer``, ``2 adapted layers``."""
    return counted(count, "adapted layer")


def printable(text: str) -> str:
    """``text`` without what could steer a terminal: names come from files."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of aligned columns, the first to the left and numbers to the right.

    Example:
        >>> columns(("layer", "r"), [("q_proj", "16")])
        ['  layer    r', '  q_proj  16']
    """
    lines = [tuple(head), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    ]


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"


def listed(title: str, names: Sequence[str]) -> list[str]:
    """A line with the number of ``names``, and one for each of the first; names that differ by numbers share a line.

    Example:
        >>> listed("unchanged", ["layers.0.q", "layers.1.q", "head"])
        ['unchanged (3):', '  layers.*.q (2)', '  head']
    """
    counts = Counter(map(folded, names))
    first = [f"  {name} ({count:,})" if count > 1 else f"  {name}" for name, count in counts.items()][:LISTED]
    more = [f"  and {len(counts) - LISTED:,} more"] if len(counts) > LISTED else []
    return [printable(line) for line in (f"{title} ({len(names):,}):", *first, *more)] if names else []


def result(layers: Iterable[Mapping[str, Any]], total: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The result of a command for programs: every command gives these two entries, and others.

    Args:
        layers: one object for each layer or tensor, with its ``name``.
        total: numbers for all of them together.
        more: what only this command gives.
    """
    return {"layers": list(layers), "total": dict(total), **more}


def _named(by_name: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, **asdict(layer)} for name, layer in by_name.items()]


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it, which has no NaN."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspection_text(inspection: Inspection) -> str:
    """Every pair, and the facts in the files."""
    rows, several = _inspected(inspection)
    lines = [printable(f"{inspection.path}: {inspection.kind}, {_heading(inspection)}")]
    if rows:
        lines += columns(("layer", "in -> out", "r", "scale", "parameters", "|delta|", "adapter")[: len(rows[0])], rows)
        lines += [
            printable(f"{name}: {inspection.parameters(name):,} parameters, |delta| {number(inspection.norm(name))}")
            for name in several
        ]
        total = "" if several else f"; |delta| of all {number(inspection.norm())}"
        lines += [f"{inspection.parameters():,} parameters in {bytes_text(inspection.nbytes)}{total}"]
    others = [f"{name} {list(shape)}" for name, shape in inspection.others.items()]
    lines += listed("other tensors" if rows else "tensors", others)
    lines += [f"fingerprint of the base: {'yes' if inspection.fingerprint else 'no'}"]
    described = {
        key: value for key, value in inspection.about.items() if not key.partition(" of ")[0].endswith(".config")
    }  # the table has it
    for key, value in described.items():
        lines += listed(key, value) if isinstance(value, list) else [printable(f"{key}: {value!s:.300}")]
    return "\n".join(lines)


def _inspected(inspection: Inspection) -> tuple[list[tuple[str, ...]], list[str]]:
    """The row of each pair, with the name of its adapter where there are several, and these names."""
    several = inspection.adapters()
    rows: list[tuple[str, ...]] = [
        (layer.name or "(the model itself)", f"{layer.in_features} -> {layer.out_features}", str(layer.r),
         number(layer.scale), f"{layer.parameters:,}", number(layer.norm), layer.adapter)
        for layer in inspection.layers
    ]  # fmt: skip
    return (rows if several else [row[:-1] for row in rows]), several


def _heading(inspection: Inspection) -> str:
    """The contents in a few words."""
    if inspection.method != "lora":
        return f"method {inspection.method}, {counted(len(inspection.others), 'tensor')}"
    if not inspection.layers:
        return "no A and B"
    ranks = ", ".join(map(str, sorted({layer.r for layer in inspection.layers})))
    several = inspection.adapters()
    if several:
        return f"adapters {', '.join(several)}: {counted(len(inspection.layers), 'pair')}, rank {ranks}"
    return f"{layers_text(len(inspection.layers))}, rank {ranks}"


def inspection_data(inspection: Inspection) -> dict[str, Any]:
    """The same for programs."""
    facts = asdict(inspection)
    return result(facts.pop("layers"), {"parameters": inspection.parameters(), "norm": inspection.norm()}, **facts)


def merge_text(report: MergeReport, out: str) -> str:
    """The loss by rounding, worst layers first, and the other changes."""
    worst = sorted(report.layers.items(), key=lambda item: -item[1].lost)
    rows = [(name, number(w.weight), number(w.delta), f"{w.lost:.2%}") for name, w in worst[:LISTED]]
    lines = [printable(f"{out}: {counted(len(worst), 'weight')} merged, {bytes_text(report.written)}")]
    lines += columns(("weight", "|W|", "|delta|", "lost by rounding"), rows)
    lines += [f"  and {len(worst) - LISTED:,} more, of which less was lost"] if len(worst) > LISTED else []
    lines += [f"Rounding to the base's dtype lost {report.lost():.2%} of delta's norm."]
    dequantized = report.dequantized
    lines += [f"dequantized: {counted(len(dequantized), 'weight')} of the base"] if dequantized else []
    if report.quantized:
        lines += [QUANTIZED.format(count=counted(len(report.quantized), "weight")) + OTHER_VALUES * (not dequantized)]
    lines += listed("replaced by the adapter's own", report.replaced) + listed("new in the adapter", report.added)
    return "\n".join(lines + listed("not copied: other weights, and links out of the base", report.left_out))


def merge_data(report: MergeReport) -> dict[str, Any]:
    """The same for programs."""
    facts = asdict(replace(report, layers={}))
    facts.pop("layers")
    return result(_named(report.layers), {"lost": report.lost(), "written": facts.pop("written")}, **facts)


def difference_text(differences: Differences, top: int) -> str:
    """The largest differences, and how many weights differ."""
    changed = [row for row in differences.rows if row.changed()]
    what = "|delta_A|, |delta_B|" if differences.kind == "adapters" else "|A|, |B|"
    first, second = what.split(", ")
    head = ("name", first, second, "|A - B|", "relative", "cosine", "note")
    kind = "updates" if differences.kind == "adapters" else "tensors"
    lines = [f"{kind} that differ: {len(changed):,} of {len(differences.rows):,}"]
    lines += columns(head, [_difference(row) for row in [*changed[:top], differences.total()]]) if changed else []
    lines += [f"  {len(changed) - top:,} more are not shown: see --top"] if len(changed) > top else []
    return "\n".join(lines)


def _difference(row: Difference) -> tuple[str, ...]:
    numbers = (row.first, row.second, row.distance, row.relative)
    return (row.name, *map(number, numbers), "-" if row.cosine is None else f"{row.cosine:.6f}", row.note)


def difference_data(differences: Differences) -> dict[str, Any]:
    """The same for programs, every row of it."""
    rows = [
        asdict(row) | {"relative": row.relative, "changed": row.changed()}
        for row in (*differences.rows, differences.total())
    ]
    return result(rows[:-1], rows[-1], kind=differences.kind)


def extraction_text(extraction: Extraction, out: str) -> str:
    """The energy kept, worst layers first, and the changes without a pair."""
    worst = sorted(extraction.layers.items(), key=lambda item: item[1].energy)
    rows = [(name, number(e.delta), number(e.relative), f"{e.energy:.2%}") for name, e in worst[:LISTED]]
    lines = [printable(f"{out}: {counted(len(worst), 'pair')}")]
    lines += columns(("layer", "|delta|", "of |W|", "energy kept"), rows)
    lines += [f"  and {len(worst) - LISTED:,} more, of which more was kept"] if len(worst) > LISTED else []
    lines += [f"The adapter has {extraction.energy():.2%} of the squared norm of these changes."]
    lines += listed("unchanged, without a pair", extraction.unchanged)
    return "\n".join(
        lines + listed("changed, but not covered", [f"{n}: {why}" for n, why in extraction.not_covered.items()])
    )


def extraction_data(extraction: Extraction) -> dict[str, Any]:
    """The same for programs."""
    layers, energy = _named(extraction.layers), extraction.energy()
    return result(layers, {"energy": energy}, unchanged=extraction.unchanged, not_covered=extraction.not_covered)


def exported_text(exported: Exported) -> str:
    """The written file, and the module that its names are relative to."""
    relative = f"names relative to `{exported.inner}`" if exported.inner else "names as the checkpoint has them"
    several = f"adapters {', '.join(exported.adapters)}, each in a sub-directory; " if exported.adapters else ""
    size = f"{layers_text(len(exported.layers))}, {bytes_text(exported.nbytes)}"
    return printable(f"{exported.path}: {several}{size}; {relative}")


def exported_data(exported: Exported) -> dict[str, Any]:
    """The same for programs."""
    layers = [{"name": name} for name in exported.layers]
    return result(
        layers, {"nbytes": exported.nbytes}, path=exported.path, inner=exported.inner, adapters=exported.adapters
    )


def costs_text(planned: PlannedCosts) -> str:
    """The plan, and bytes with LoRA and without."""
    costs = planned.costs
    rows = [(f"checkpoint, {8 * width}-bit", *map(bytes_text, costs.checkpoint(width))) for width in (2, 4)]
    rows += [
        (f"training, {how.name} ({how.trained} bytes a parameter)", *map(bytes_text, costs.memory(how)))
        for how in ACCOUNTINGS
    ]
    model = f" ({planned.model})" if planned.model else ""
    lines = [
        printable(f"{planned.source}{model}"),
        str(planned.plan),
        "",
        *columns(("bytes", "full fine-tuning", "LoRA"), rows),
    ]
    lines += [
        "  training: weights, gradients and Adam's two moments; activations not counted. With LoRA the base has",
        "  weights alone (2 bytes a parameter in 16-bit, 4 in fp32), and a parameter of an adapter takes "
        f"{ADAPTER} bytes (fp32).",
    ]
    return "\n".join(lines)


def costs_data(planned: PlannedCosts) -> dict[str, Any]:
    """The same for programs."""
    total = {
        "base_parameters": planned.costs.base,
        "trainable_parameters": planned.costs.trainable,
        "checkpoint_bytes": {f"{8 * w}-bit": _both(planned.costs.checkpoint(w)) for w in (2, 4)},
        "training_bytes": {how.name: _both(planned.costs.memory(how)) for how in ACCOUNTINGS},
    }
    return result(map(asdict, planned.plan.rows), total, source=planned.source, model=planned.model)


def _both(values: tuple[int, int]) -> dict[str, int]:
    return {"full": values[0], "lora": values[1]}
