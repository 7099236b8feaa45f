"""A case of the table: the message, the words that it must hold, and the code that does what it says."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tests.helpers.models import Lit, checkpoints, data, net, trainer
from tests.helpers.remedies.messages import Message, message_that_begins

LOGGER = "lightning.pytorch.utilities.rank_zero"  # where `rank_zero_info` logs
Act = Callable[["Expected", Path], None]


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        file: of the package, in which the message is written.
        begin: the first words of the message there, `{}` for each value in it.
        words: what has to be in the text as the user gets it: the argument as it was given, and the remedy.
        act: provokes the message inside `with message:`, and follows its advice after it.
    """

    file: str
    begin: str
    words: tuple[str, ...]
    act: Act

    def run(self, folder: Path) -> None:
        expected = Expected(message_that_begins(self.file, self.begin), self.words)
        self.act(expected, folder)
        assert expected.came, f"{self.act.__name__} never opened `with message:`"


class Expected:
    """The context in which the message must come, as an error, a warning or a line of the log."""

    def __init__(self, message: Message, words: tuple[str, ...]) -> None:
        self.message, self.words, self.came = message, words, False
        self._texts: list[str] = []

    def __enter__(self) -> None:
        self._contexts = warnings.catch_warnings(record=True), lines_of_log(self._texts)
        self._warnings = self._contexts[0].__enter__()
        self._contexts[1].__enter__()
        warnings.simplefilter("always")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)
        if error is not None and not isinstance(error, Exception):
            return False
        texts = [*self._texts, *(str(warning.message) for warning in self._warnings)]
        self._check([*texts, *map(str, chain(error))])
        return True

    def _check(self, texts: list[str]) -> None:
        for text in texts:
            if re.search(self.message.pattern, text):
                missing = [words for words in self.words if words not in text]
                assert not missing, f"{missing} not in {text!r}"
                self.came = True
                return
        raise AssertionError(f"{self.message.text!r} did not come, but {texts}")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that came before it: where weights are on the meta device, Lightning's teardown fails too."""
    while error is not None:
        yield error
        error = error.__context__


@contextmanager
def lines_of_log(texts: list[str]) -> Iterator[None]:
    """Collect what Lightning logs in ``texts``."""
    handler, logger = logging.Handler(), logging.getLogger(LOGGER)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def remedy(file: str, begin: str, *words: str) -> Callable[[Act], Case]:
    """Make a case of a function."""
    return lambda act: Case(file, begin, words, act)


@contextmanager
def warnings_ignored() -> Iterator[None]:
    """For a run that leads to the message, and warns of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def cases_in(module: object) -> list[Case]:
    """The cases of a table, in the order they are written in."""
    return [value for value in vars(module).values() if isinstance(value, Case)]


def fit(*callbacks: object, module: nn.Module | None = None, ckpt_path: object = None, **kwargs: object) -> nn.Module:
    """A run of two steps; the module, which has to have moved."""
    module = Lit() if module is None else module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    settings = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, **kwargs}
    trainer(*callbacks, **settings).fit(module, data(), data(1), ckpt_path=ckpt_path)
    after = module.state_dict()
    assert any(name not in before or not torch.equal(value, before[name]) for name, value in after.items())
    return module


def fit_to_file(folder: Path, *callbacks: object, module: nn.Module | None = None, **kwargs: object) -> str:
    """The path of the last checkpoint of such a run."""
    files = checkpoints(folder)
    fit(*callbacks, files, module=module, **kwargs)
    return str(files.last_model_path)


def outputs(module: nn.Module) -> torch.Tensor:
    """What ``module`` computes in evaluation."""
    with torch.no_grad():
        return module.eval()(data(5).dataset.tensors[0])


def base_outputs() -> torch.Tensor:
    return outputs(net())
