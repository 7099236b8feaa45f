"""Language models of random weights, in bf16 with AdamW: BERT-base, 0.5 B, 1.1 B and 7 B."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from speed_sections.adapters import Case
from speed_sections.bars import at_least, at_most
from speed_sections.comparison import compare, never_slower, ours, share, table
from speed_sections.decoders import (
    EVERY,
    QV,
    checkpointed_step,
    first_norm,
    llama,
    llama_case,
    llama_shape,
    qwen,
    step_of,
)
from speed_sections.rows import FULL, PEFT_FP32, measure
from speed_sections.settings import DEVICE, Settings
from speed_sections.timing import Step
from speed_sections.training import drawn, training

BERT_LAYERS = ["query", "key", "value", "intermediate.dense", "output.dense"]  # the last name is of two layers a block
BERT_TINY = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def bert_model(settings: Settings) -> nn.Module:
    config = BertConfig(**(BERT_TINY if settings.small else {}))
    return drawn(lambda: BertForSequenceClassification(config))


def bert_step(shape: tuple[int, int], model: nn.Module) -> Step:
    ids = torch.randint(0, model.config.vocab_size, shape, device=DEVICE)
    labels = torch.randint(0, 2, shape[:1], device=DEVICE)
    return training(lambda call: call(input_ids=ids, labels=labels).loss, model)


def bert(settings: Settings) -> list[str]:
    """The bar is full fine-tuning's own speed, which peft and an older version of this package did not reach."""
    shape = (2, 16) if settings.small else (32, 128)
    case = Case(
        partial(bert_model, settings),
        lambda model: model.bert.encoder.layer[0].attention.output.LayerNorm.weight,
        partial(bert_step, shape),
        BERT_LAYERS,
        r=8,
    )
    rows = measure(case.rows(settings), settings.windows(9, 10), settings)
    lines = table(f"BERT-base, {shape[0]} x {shape[1]} tokens, r = 8 on six linear layers a block", rows, settings)
    for name in ours(rows):
        own = share(rows, FULL)
        lines.append(at_least(f"{name}, share of the bound's speed, as full fine-tuning", share(rows, name), own, 0.70))
        lines += never_slower(rows, name)
    return lines


def qwen_shapes(settings: Settings) -> list[str]:
    size, shape = ("tiny", (2, 32)) if settings.small else ("0.5 B", (16, 512))
    case = Case(partial(qwen, size), first_norm, partial(step_of, shape), EVERY, r=16)
    title = f"Shapes of Qwen2.5, {size}, {shape[0]} x {shape[1]} tokens, r = 16 on all projections"
    return compare(title, case.rows(settings), settings.windows(7, 5), settings, bar=0.84, aim=0.88)


def llama_title(settings: Settings, what: str) -> str:
    size, (batch, length) = llama_shape(settings)
    return f"Shapes of Llama, {size}, {batch} x {length} tokens, {what}"


def checkpointing(settings: Settings) -> list[str]:
    _, shape = llama_shape(settings)
    starts = replace(llama_case(settings), step=partial(checkpointed_step, shape)).rows(settings)
    title = llama_title(settings, "r = 16 on all projections, checkpointing (use_reentrant=False)")
    return compare(title, starts, settings.windows(5, 4), settings, bar=0.85, aim=0.88)


def dropout(settings: Settings) -> list[str]:
    starts = llama_case(settings, dropout=0.05).rows(settings)
    title = llama_title(settings, "r = 16 on all projections, dropout 0.05")
    return compare(title, starts, settings.windows(5, 4), settings, bar=0.84)


def ranks(settings: Settings) -> list[str]:
    lines = []
    for r, bar in ((64, 0.87), (128, 0.84)):
        starts = llama_case(settings, r=r).rows_with_fp32(settings)
        title = llama_title(settings, f"r = {r} on all projections")
        lines += [*compare(title, starts, settings.windows(5, 4), settings, bar=bar, memory_of=[FULL, PEFT_FP32]), ""]
    return lines


def seven_b(settings: Settings) -> list[str]:
    size, shape = ("tiny", (1, 16)) if settings.small else ("7 B", (1, 512))
    case = Case(partial(llama, size), first_norm, partial(step_of, shape), QV, r=8)
    rows = measure(case.rows(settings), settings.windows(7, 5), settings)
    title = f"Few tokens: shapes of Llama, {size}, {shape[0]} x {shape[1]} tokens, r = 8 on q and v"
    lines = table(title, rows, settings)
    for name in ours(rows):
        lines += [
            at_most(f"{name}, time over that of the bound", 1 / share(rows, name), 1.12),
            *never_slower(rows, name),
        ]
    return lines


def llama_eager(settings: Settings) -> list[str]:
    case, windows = llama_case(settings), settings.windows(7, 4)
    starts = case.rows_with_fp32(settings)
    title = llama_title(settings, "r = 16 on all projections")
    lines = compare(title, starts, windows, settings, bar=0.90, memory_of=[FULL, PEFT_FP32])
    starts = replace(case, targets=QV).rows(settings)
    return [*lines, "", *compare(llama_title(settings, "r = 16 on q and v"), starts, windows, settings, bar=0.985)]


def llama_compiled(settings: Settings) -> list[str]:
    """Compiling all 16 layers of every row would take minutes; the share of a layer in a step stays the same."""
    size, shape = llama_shape(settings)
    quarter = size if settings.small else f"{size}, 4 of its 16 layers and a quarter of its vocabulary"
    step = partial(step_of, shape, compiled=True)
    starts = replace(llama_case(settings), make=partial(llama, quarter), step=step).rows(settings)
    batch, length = shape
    title = f"Shapes of Llama, {quarter}, {batch} x {length} tokens, r = 16 on all projections, torch.compile"
    return compare(title, starts, settings.windows(7, 4), settings, bar=0.88)


def mixed(settings: Settings) -> list[str]:
    """fp32 weights under autocast: peft's better setting here are fp32 adapters, and the only one."""
    from lightning_lora.model.base_dtype import LoweredWeights, cast_by_autocast

    size, shape = llama_shape(settings)

    def lowered(model: nn.Module) -> Step:
        LoweredWeights(torch.bfloat16).lower(list(cast_by_autocast(model)))
        return step_of(shape, model, autocast=True)

    make = partial(llama, size, torch.float32)
    case = replace(llama_case(settings), make=make, step=partial(step_of, shape, autocast=True))
    starts = {**case.references(), **case.peft_fp32(), **case.ours(settings)}
    starts |= replace(case, step=lowered).ours(settings, ', base_dtype="bf16"')
    title = llama_title(settings, "r = 16 on all projections, bf16-mixed")
    return compare(title, starts, settings.windows(5, 4), settings, bar=0.93)
