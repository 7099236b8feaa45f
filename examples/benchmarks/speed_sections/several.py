"""Several adapters on one model: a batch whose samples use different ones, against a batch that uses one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, lora_parameters, use_adapters
from speed_sections.adapters import adapted_by_peft, frozen_but, with_trained_B
from speed_sections.bars import at_most
from speed_sections.comparison import heading, table
from speed_sections.decoders import EVERY, first_norm, llama
from speed_sections.host import PROJECTIONS, Block, paths_of_gpus
from speed_sections.rows import BOUND, FULL, PEFT_BF16, Rows, Start, measure
from speed_sections.settings import DEVICE, OURS, Settings, Windows
from speed_sections.timing import Step, in_turns, threads
from speed_sections.training import training

R, FEW, MANY = 16, 8, 64
HOST_R, HOST_WIDTH = 2, 16  # so small that arithmetic takes no time
ONE, CHOSEN = f"{OURS}, one adapter", f"{OURS}, one of several chosen"
PEFT_MIXED = f"peft, {FEW} adapters, mixed"
Starts = dict[str, Start]
Choose = Callable[[nn.Module], AbstractContextManager[object]]


def mixed_row(count: int) -> str:
    return f"{OURS}, {count} adapters, mixed"


def names(count: int) -> list[str]:
    return [f"a{index}" for index in range(count)]


def several_adapters(base: nn.Module, count: int, targets: list[str], r: int = R) -> nn.Module:
    """``base`` with ``count`` adapters, as after some steps."""
    apply_lora(base, LoRAConfig(r=r, targets=targets, adapters={name: {} for name in names(count)}))
    return with_trained_B(base, [value for key, value in lora_parameters(base) if key.endswith("B")])


def entries(batch: int, count: int) -> list[str]:
    """One adapter for each sample, in no order that helps."""
    return [names(count)[(5 * sample + 3) % count] for sample in range(batch)]


def by_sample(batch: int, count: int, model: nn.Module) -> AbstractContextManager[None]:
    return use_adapters(model, entries(batch, count))


def first_alone(model: nn.Module) -> AbstractContextManager[None]:
    return use_adapters(model, names(1)[0])


def nothing(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def training_step(shape: tuple[int, int], choose: Choose, model: nn.Module) -> Step:
    """A step of AdamW on ``shape`` tokens."""
    ids = torch.randint(0, model.config.vocab_size, shape, device=DEVICE)

    def loss(call: nn.Module) -> torch.Tensor:
        with choose(model):
            value: torch.Tensor = call(input_ids=ids, labels=ids).loss
            return value

    return training(loss, model)


def inference_step(shape: tuple[int, int], choose: Choose, model: nn.Module, **arguments: object) -> Step:
    """A forward pass on ``shape`` tokens; only the last position goes through the head."""
    ids = torch.randint(0, model.config.vocab_size, shape, device=DEVICE)
    model.eval()

    @torch.no_grad()
    def step() -> None:
        with choose(model):
            model(input_ids=ids, logits_to_keep=1, **arguments)

    return step


def rows_of(step: Callable[..., Step], batch: int, size: str, counts: list[int]) -> Starts:
    """This package with one adapter; with a few, of which one is chosen; and with as many as are mixed."""
    rows: Starts = {
        ONE: lambda: step(nothing, several_adapters(llama(size), 1, EVERY)),
        CHOSEN: lambda: step(first_alone, loaded(size, counts[0])),
    }
    for count in counts:
        rows[mixed_row(count)] = lambda count=count: step(partial(by_sample, batch, count), loaded(size, count))
    return rows


def peft_mixed(batch: int, count: int, model: nn.Module) -> tuple[nn.Module, dict[str, object]]:
    """``model`` with several adapters of peft, and the argument that chooses by sample; peft takes it in inference."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=EVERY)
    first, *others = names(count)
    wrapped = peft.get_peft_model(model, config, adapter_name=first, autocast_adapter_dtype=False)
    for name in others:
        wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    with_trained_B(wrapped, [value for key, value in wrapped.named_parameters() if "lora_B" in key])
    return wrapped.to(DEVICE), {"adapter_names": entries(batch, count)}


def peft_inference(shape: tuple[int, int], make: Callable[[], nn.Module]) -> Step:
    model, arguments = peft_mixed(shape[0], FEW, make())
    return inference_step(shape, nothing, model, **arguments)


@cache
def loaded(size: str, count: int) -> nn.Module:
    """A model with ``count`` adapters, for all sections."""
    return several_adapters(llama(size), count, EVERY)


def sizes(settings: Settings) -> tuple[str, int, list[int]]:
    """The size of the model, rows, and how many adapters are mixed."""
    return ("tiny", 4, [2]) if settings.small else ("1.1 B", 64, [FEW, MANY])


def several(settings: Settings) -> list[str]:
    """Steps on 64 rows of 128 tokens."""
    return steps(settings, 8 if settings.small else 128)


def several_long(settings: Settings) -> list[str]:
    """Steps on 64 rows of 512 tokens."""
    return steps(settings, 8 if settings.small else 512)


def steps(settings: Settings, length: int) -> list[str]:
    size, batch, counts = sizes(settings)
    make, step = partial(llama, size), partial(training_step, (batch, length))
    starts: Starts = {
        **rows_of(step, batch, size, counts),
        BOUND: lambda: step(nothing, frozen_but(make(), first_norm)),
        FULL: lambda: step(nothing, make()),
        PEFT_BF16: lambda: step(nothing, adapted_by_peft(make(), EVERY, R)),
    }
    title = f"Several adapters, a step: {shapes(size, batch, length)}"
    return compared(title, starts, settings.windows(3, 3), settings, counts)


def several_inference(settings: Settings) -> list[str]:
    """Forward passes on 64 rows: one token, as with a cache, and more."""
    (size, batch, counts), lines = sizes(settings), []
    make = partial(llama, size)
    for length in [8] if settings.small else [1, 32, 256]:
        step = partial(inference_step, (batch, length))
        starts: Starts = {
            **rows_of(step, batch, size, counts),
            BOUND: lambda step=step: step(nothing, make()),
            PEFT_MIXED: lambda length=length: peft_inference((batch, length), make),
        }
        title = f"Several adapters, a forward pass: {shapes(size, batch, length)}"
        lines += compared(title, starts, settings.windows(5, 3), settings, counts)
    return lines


def shapes(size: str, batch: int, length: int) -> str:
    return f"shapes of Llama, {size}, {batch} x {length} tokens, r = {R} on all projections"


def compared(title: str, starts: Starts, windows: Windows, settings: Settings, counts: list[int]) -> list[str]:
    rows = measure(starts, windows, settings)
    lines = table(title, rows, settings)
    for name in [CHOSEN, *map(mixed_row, counts)]:
        lines.append(at_most(f"{name}, time over that of one adapter", ratio(rows, name, ONE), 1.15))
    return [*lines, ""]


def ratio(rows: Rows, name: str, reference: str) -> float:
    return rows[name].ms / rows[reference].ms


def several_host(settings: Settings) -> list[str]:
    """Python and launches of a layer, as in the section "host".

    In fp64, as on a CPU a product of bf16 takes longer than what is measured; A and B are cast in either case.
    """
    blocks, windows, batch = (1, Windows(2, 1), 4) if settings.tiny else (6, Windows(15, 12), 64)
    counts = [2] if settings.tiny else [FEW, MANY]
    chosen: dict[str, tuple[int, Choose]] = {ONE: (1, nothing), CHOSEN: (counts[0], first_alone)}
    chosen |= {mixed_row(count): (count, partial(by_sample, batch, count)) for count in counts}
    us = {}
    with threads(1), paths_of_gpus():
        for trains in (True, False):
            steps = {name: host_step(blocks, batch, trains, *each) for name, each in chosen.items()}
            for step in steps.values():
                for _ in range(4):
                    step()
            times = in_turns(steps, windows, summary=min)
            us[trains] = {name: ms * 1000 / (blocks * len(PROJECTIONS)) for name, ms in times.items()}
    title = f"Several adapters, host time of a layer in us: CPU, one thread, fp64, r = {HOST_R}, {batch} rows"
    lines = heading(title, settings.tiny)
    lines += ["| | forward and backward | forward without gradients |", "|---|---|---|"]
    lines += [f"| {name} | {us[True][name]:.0f} | {us[False][name]:.0f} |" for name in chosen]
    name = mixed_row(counts[0])
    return [*lines, "", at_most(f"{name}, host time over that of one adapter", us[True][name] / us[True][ONE], 3.0)]


def host_step(blocks: int, batch: int, trains: bool, count: int, choose: Choose) -> Step:
    base = nn.Sequential(*(Block(HOST_WIDTH) for _ in range(blocks))).double()
    model = several_adapters(base, count, PROJECTIONS, HOST_R)
    x = torch.randn(batch, 1, HOST_WIDTH, dtype=torch.float64, requires_grad=trains)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def inference() -> None:
        with choose(model):
            model(x)

    def step() -> None:
        with choose(model):
            y = model(x)
        y.sum().backward()
        for parameter in trained:
            parameter.grad = None

    return step if trains else inference
