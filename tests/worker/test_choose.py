"""The class of workers: the one that is here, somebody else's, and either with more mixed in."""

from __future__ import annotations

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, MissingExtra
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.worker.choose import choose_worker
from moe_serve.worker.worker import Worker
from tests.support.worker_classes import Greeting, NamedWorker

HERE = "tests.support.worker_classes"


def parallel(**options: object) -> ParallelConfig:
    return Config.from_flat(options).parallel


def test_a_worker_is_of_the_class_that_is_asked_for_with_what_is_mixed_in() -> None:
    assert choose_worker(parallel()) is Worker
    assert choose_worker(parallel(worker_cls=f"{HERE}.NamedWorker")) is NamedWorker
    both = choose_worker(parallel(worker_cls=f"{HERE}:NamedWorker", worker_extension_cls=f"{HERE}.Greeting"))
    assert both.__bases__ == (NamedWorker, Greeting)
    assert choose_worker(parallel(worker_extension_cls=f"{HERE}.Greeting")).__bases__ == (Worker, Greeting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_cls": f"{HERE}.Greeting"}, "Greeting' is no subclass of moe_serve.worker.worker:Worker"),
        ({"worker_cls": f"{HERE}.Missing"}, "--worker-cls .* names no class: .*give package.module:Class"),
        ({"worker_cls": f"{HERE}.NOT_A_CLASS"}, "is no class but a int"),
        ({"worker_extension_cls": f"{HERE}.Clashing"}, "Clashing' has close, handle, as the worker class Worker has"),
        ({"worker_extension_cls": "nonsense"}, "--worker-extension-cls 'nonsense'"),
    ],
    ids=str,
)
def test_what_is_no_class_of_workers_or_has_names_of_it_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, MissingExtra), match=message):
        choose_worker(parallel(**options))
