"""From what the operator said to what will be run: after this no option is "auto" or "worked out later".

The exception is `device`, which only a process that has torch can settle; the engines report it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from moe_serve.base.checkpoint_size import check_size
from moe_serve.base.config import Config
from moe_serve.base.errors import CheckpointError, ConfigError
from moe_serve.base.model_config import ModelConfig, load_model_config
from moe_serve.executor.choose import settle_executor
from moe_serve.executor.devices import gpus_here
from moe_serve.model.all2all.choose import settle_backend, this_machine
from moe_serve.model.all2all.limits import check_dispatch
from moe_serve.model.all2all.shape import dispatch_shape, expert_layout
from moe_serve.model.partition import make_partition

DEFAULT_MODEL = "moe-serve-default"
SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "default-model"
HUB_SECONDS = 10.0
DESCRIPTIONS = ["*.json"]
HUB_FILES = [*DESCRIPTIONS, "*.safetensors", "*.jinja"]
log = logging.getLogger(__name__)


def resolve(config: Config, *, weights: bool = True) -> tuple[Config, ModelConfig]:
    """A config in which the model is a folder and sizes are settled, and what that folder says.

    Without `weights` a model on the hub is not fetched whole, only what describes it. Raises ConfigError or
    MissingExtra for everything that can be known before a process is started.
    """
    config.parallel.check_built()
    gpus = 0 if config.model.device == "cpu" else gpus_here(os.environ)
    executor = settle_executor(config.parallel, gpus=gpus)
    folder = model_folder(config.model.model, config.model.revision, HUB_FILES if weights else DESCRIPTIONS)
    model = load_model_config(folder)
    if weights and config.model.load_format == "auto":
        check_size(folder, model)
    for note in model.notes:
        log.warning("%s", note)
    limit = model.max_position_embeddings
    asked = config.model.max_model_len
    if asked is not None and asked > limit:
        raise ConfigError(f"max_model_len {asked} is more than the checkpoint allows ({limit}); lower --max-model-len")
    parallel = config.parallel
    dtype = model.dtype if config.model.dtype == "auto" else config.model.dtype
    partition = make_partition(model, parallel, 0)  # refuses sizes that the model cannot be cut into
    backend = _settle_all2all(config, str(executor["distributed_executor_backend"]))
    shape = dispatch_shape(
        model,
        parallel,
        max_tokens=config.scheduler.max_num_batched_tokens,
        dtype=dtype,
        device=config.model.device,
    )
    check_dispatch(backend, shape, expert_layout(partition))
    return (
        config.with_(
            "model",
            model=str(folder),
            served_model_name=config.model.served_model_name or config.model.model or DEFAULT_MODEL,
            max_model_len=asked or limit,
            profile=_profile(config.model.profile),
            dtype=dtype,
        ).with_("parallel", all2all_backend=backend, **executor),
        model,
    )


def _profile(file: str | None) -> str | None:
    """As every process of this machine finds it; ConfigError where it could not be written in the end."""
    if file is None:
        return None
    path = Path(file).absolute()
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--profile {file}: {path.parent} is no folder that can be written to; give another file")
    return str(path)


def _settle_all2all(config: Config, executor: str) -> str:
    parallel = config.parallel
    backend, why = settle_backend(
        parallel,
        executor=executor,
        device=config.model.device,
        machine=this_machine(),
        environment=os.environ,
    )
    if why and parallel.topology.ep > 1:
        log.info("all-to-all backend %s: %s", backend, why)
    return backend


def model_folder(model: str | None, revision: str | None, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a model: the default one, a folder as given, or a download of `files` from the Hugging Face hub."""
    if model is None:
        return default_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise CheckpointError(f"{model} is a file; the model must be a folder in the Hugging Face layout")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"no such model folder: {model} (nor is it an owner/name on the Hugging Face hub)")
    return _download(model, revision, files)


def _download(model: str, revision: str | None, files: Sequence[str]) -> Path:
    """A model's folder in the hub's cache, fetched if needed; where the hub cannot be reached, what is there already.

    The hub is asked first, since a download would wait for its answer without a bound. Its HTTP library, and with it
    the classes of what can be raised, differs between its versions.
    """
    unreachable: Exception | None = None
    try:
        HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _not_had(model, error) from error
    except Exception as error:  # noqa: BLE001
        unreachable = error
    try:
        offline = unreachable is not None
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files), local_files_only=offline))
    except Exception as error:
        raise _not_had(model, unreachable or error) from error


def _not_had(model: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__
    return CheckpointError(
        f"{model} is no folder here and could not be had from the Hugging Face hub: {reason}; give a folder, or an "
        "owner/name that the hub has (option MODEL)"
    )


def default_model() -> Path:
    """The small trained model that comes with the package."""
    if not (SHIPPED_MODEL / "config.json").exists():
        raise CheckpointError(f"the default model is missing from this installation ({SHIPPED_MODEL}); give a MODEL")
    return SHIPPED_MODEL
