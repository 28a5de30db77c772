"""Asks DeepSpeed's own classes whether they take a JSON, before processes meet."""

from __future__ import annotations

import logging
import os
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, ValidationError

from mst_ds.config import nearest
from mst_ds.engine.stepped import check_optimizer, check_scheduler
from mst_ds.files.read_file import expanded
from mst_ds.zero import DsConfig, ZeroConfig

# Blocks whose keys DeepSpeed asks for one by one, whatever their values. Of others it refuses what it does not know.
_FLAT = ("activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler", "optimizer", "scheduler")
# Of the keys whose default in DeepSpeed is None and has no type.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "communication_data_type": (str,),
    "steps_per_print": (int, float),
    "log_level": (str,),
    "vocabulary_size": (int,),
}


def require_accepted(ds_config: DsConfig, zero: ZeroConfig) -> None:
    """Make sure that DeepSpeed takes a resolved config, knows every key of it, and can do what it asks for here.

    Args:
        zero: what the config says, see `read_zero`.

    Raises:
        ValueError: in one line, with the key, its value and what is allowed.
    """
    asked = _Asked(ds_config)
    with _quiet():
        _construct(asked)
    _check_known(asked)
    _check_types(asked)
    if not getattr(get_accelerator(), f"is_{zero.dtype}_supported", lambda: True)():
        raise ValueError(f"the DeepSpeed JSON asks for {zero.dtype}, which this device does not compute in")
    _check_nvme(ds_config, zero.stage)
    with _quiet():
        check_optimizer(ds_config, zero_stage=zero.stage, is_offloaded=zero.offloads_optimizer)
        check_scheduler(ds_config, zero_stage=zero.stage)


class _Asked(dict[str, Any]):
    """A config that remembers which keys DeepSpeed asked for, with which default, and which was the last."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: _Asked(value) if isinstance(value, dict) else value for key, value in values.items()})
        self.defaults: dict[str, Any] = {}
        self.last = ""

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)

    def __copy__(self) -> _Asked:
        return self

    def _note(self, key: str, default: Any = None) -> None:
        self.last = key
        self.defaults.setdefault(key, default)


class _Keys:
    def __init__(self, asked: _Asked) -> None:
        self._asked = asked

    def __contains__(self, key: object) -> bool:
        return key in self._asked

    def __iter__(self) -> Iterator[str]:
        return iter(self._asked)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed logs: it will say the same again when it builds the engine."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _construct(asked: _Asked) -> None:
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        raise ValueError(_of_model(error, asked)) from None
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise ValueError(f"DeepSpeed refuses {_place(asked)} of its JSON: {error}") from None
    except (AttributeError, TypeError, KeyError):
        # It has called a method, or taken a key, of a value of another type than it expects.
        _check_types(asked)
        raise ValueError(
            f"{_place(asked)} of the DeepSpeed JSON is not what DeepSpeed takes; allowed: what its documentation shows"
        ) from None


def _place(asked: _Asked) -> str:
    """The key that was looked at last, with its value."""
    path, value = asked.last, dict.get(asked, asked.last)
    while isinstance(value, _Asked) and dict.__contains__(value, value.last):
        path, value = f"{path}.{value.last}", dict.get(value, value.last)
    return f"{path} ({value!r})"


def _of_model(error: ValidationError, asked: _Asked) -> str:
    """The first complaint of one of DeepSpeed's models."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    of_block = (
        []
        if location and dict.__contains__(asked, location[0]) and error.title.endswith("MonitorConfig")
        else [asked.last]
    )
    path = ".".join(of_block + location)
    if first["type"] == "extra_forbidden":
        names = _names(_model(error.title), location[:-1])
        near = nearest(location[-1], names)
        return f"the DeepSpeed JSON has the unknown key {path!r}{near}; allowed: {', '.join(sorted(names))}"
    message = str(first["msg"])
    allowed = message.removeprefix("Input should be ")
    if allowed == message:
        return f"DeepSpeed refuses {path} of its JSON: {message.removeprefix('Value error, ')}"
    return f"{path} of the DeepSpeed JSON is {first['input']!r}; allowed: {allowed}"


def _model(name: str) -> type[BaseModel] | None:
    models: list[type[BaseModel]] = [DeepSpeedConfigModel]
    for model in models:
        models += model.__subclasses__()
        if model.__name__ == name:
            return model
    return None


def _names(model: type[BaseModel] | None, location: list[str]) -> list[str]:
    """The keys of the block at this place in a model, as the documentation spells them."""
    for key in location:
        fields = {} if model is None else {field.alias or name: field for name, field in model.model_fields.items()}
        kinds = [fields[key].annotation, *typing.get_args(fields[key].annotation)] if key in fields else []
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _blocks(asked: _Asked) -> Iterator[tuple[str, _Asked]]:
    """The JSON itself and its flat blocks, each with what stands before its keys in a path."""
    yield "", asked
    for name in _FLAT:
        if isinstance(found := dict.get(asked, name), _Asked):
            yield f"{name}.", found


def _check_known(asked: _Asked) -> None:
    """What DeepSpeed has not asked for it would ignore without a word."""
    for path, found in _blocks(asked):
        for key in found:
            if key not in found.defaults:
                near = nearest(key, found.defaults)
                raise ValueError(f"the DeepSpeed JSON has the key {path + key!r}, which DeepSpeed does not know{near}")


def _check_types(asked: _Asked) -> None:
    """A value is of the type of its default."""
    for path, found in _blocks(asked):
        for key, value in found.items():
            types = _TYPES.get(path + key) or _types_like(found.defaults.get(key))
            if types and value is not None and (not isinstance(value, types) or _is_wrong_bool(value, types)):
                names = " or ".join(kind.__name__ for kind in types)
                raise ValueError(f"{path}{key} of the DeepSpeed JSON is {value!r}; allowed: {names}")


def _types_like(default: Any) -> tuple[type, ...]:
    if isinstance(default, bool | str | dict):
        return (dict,) if isinstance(default, dict) else (type(default),)
    return (int, float) if isinstance(default, float) else (int,) if isinstance(default, int) else ()


def _is_wrong_bool(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, bool) and bool not in types


def _check_nvme(ds_config: DsConfig, stage: int) -> None:
    for name in ("offload_param", "offload_optimizer"):
        offload = (ds_config.get("zero_optimization", {}).get(name)) or {}
        if offload.get("device") != "nvme":
            continue
        path = f"zero_optimization.{name}"
        if stage != 3:
            raise ValueError(f"{path}.device is 'nvme' at ZeRO stage {stage}; allowed: 'cpu', or stage 3")
        given = offload.get("nvme_path")
        if given is None:
            raise ValueError(f"{path}.device is 'nvme' without nvme_path; allowed: nvme_path beside it, a folder")
        folder = expanded(given, f"{path}.nvme_path").absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"{path}.nvme_path is {given!r}; allowed: a folder you can write")
        builder = get_accelerator().create_op_builder("AsyncIOBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            raise ValueError(
                f"{path}.device is 'nvme', for which DeepSpeed needs libaio, and its headers are not here; allowed: "
                "'cpu', or the system's package libaio-dev"
            )
