"""What launchers on several machines must have alike: what a model folder holds, not where it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_serve.base.config import Config, differing_fields
from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import load_model_config
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.cli.random_model import make_model
from moe_serve.eplb.first_placement import check_placement, placement_digest
from moe_serve.launch.resolve import resolve
from tests.support.coordinator import RunningCoordinator


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def config_of(folder: Path) -> Config:
    return resolve(Config.from_flat({"model": str(folder), "served_model_name": folder.name}))[0]


def test_copies_of_a_model_at_different_paths_agree(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "a" / "copy"))
    assert differing_fields(config_of(model).agreement(), config_of(copy).agreement()) == []


def test_another_model_is_refused_by_rank_and_option(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 3e-6}))
    mine, theirs = config_of(model), config_of(other)
    running = RunningCoordinator(mine.parallel.topology, mine.agreement())
    try:
        with pytest.raises(ConfigError, match=r'engine dp 0 .* model: "(\w+) \w+", not "\1 \w+"'):
            running.join(0, agreement=theirs.agreement())
    finally:
        running.close()


def test_weights_that_are_missing_are_another_model(model: Path, tmp_path: Path) -> None:
    short = Path(shutil.copytree(model, tmp_path / "short"))
    (short / next(model.glob("*.safetensors")).name).unlink()
    mine, theirs = (Config.from_flat({"model": str(folder)}).agreement() for folder in (model, short))
    assert [line.split(":")[0] for line in differing_fields(mine, theirs)] == ["model"]


def test_experts_that_start_elsewhere_than_the_coordinator_counts_on_are_refused(model: Path) -> None:
    facts = load_model_config(model)
    linear, robin = (
        ParallelConfig(data_parallel_size=2, enable_expert_parallel=True, expert_placement_strategy=strategy)
        for strategy in ("linear", "round_robin")
    )
    expected = placement_digest(linear, facts)
    check_placement(expected, linear, facts)
    check_placement("", robin, facts)
    with pytest.raises(ConfigError, match="--expert-placement-file"):
        check_placement(expected, robin, facts)
    assert placement_digest(ParallelConfig(data_parallel_size=2), facts) == ""
