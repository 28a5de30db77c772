"""From the command line, and a YAML file, to what the user asked for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

from mst_ds.command_line.flags import OneLineParser, unknown_flag
from mst_ds.config import TrainConfig, nearest
from mst_ds.files.read_file import existing_file, read_yaml

_OF_SEVERAL_WORDS = ("dataset", "report_to", "add_tokens", "add_special_tokens")


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Reads flags, over the YAML file named by `--config`, over the defaults; then validates.

    Raises:
        ValueError: an unknown flag, a value of the wrong type or one that fails `validate`; a YAML file that is
            missing or malformed, or has an unknown key.
    """
    from transformers import HfArgumentParser

    class Parser(OneLineParser, HfArgumentParser):
        def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
            parse = kwargs.pop("parse", None)
            if parse is not None:
                kwargs["type"] = _argument_type(parse)
            if kwargs.get("nargs") == "+":
                # transformers leaves out the default of a flag that may be a list, where it is none.
                kwargs.setdefault("default", getattr(TrainConfig, names[0].lstrip("-")))
            return super().add_argument(*names, **kwargs)

    def parse_flags(flags: Sequence[str]) -> TrainConfig:
        parser = Parser(cast(Any, TrainConfig), allow_abbrev=False)  # its own annotation admits no class
        parsed, unknown = parser.parse_args_into_dataclasses(
            list(flags), look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise unknown_flag(unknown[0], (flag.name for flag in dataclasses.fields(TrainConfig)))
        return cast(TrainConfig, parsed)

    flags = list(argv)
    for name in _OF_SEVERAL_WORDS:
        if [flag.partition("=")[0].replace("-", "_") for flag in flags].count(f"__{name}") > 1:
            raise ValueError(f"{name} is given twice; allowed: once, with all its words after it")
    config = parse_flags(flags)
    if config.config is not None:
        # argparse keeps the last of repeated flags: the file's values go first, so that the user's flags win.
        flags = [*_yaml_flags(config.config), *flags]
        config = parse_flags(flags)
    # The parser takes dashes in names, too.
    words = {flag.partition("=")[0][2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    config.given = frozenset(words & {flag.name for flag in dataclasses.fields(TrainConfig)})
    config.validate()
    return config


def _argument_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            # argparse shows the text of this exception; of a ValueError it would show the function's name.
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _yaml_flags(given: str) -> list[str]:
    path = existing_file(given, "config", "an existing YAML file")
    values = read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"config {path} holds a {type(values).__name__}; allowed: a mapping from flag to value")
    allowed = [flag.name for flag in dataclasses.fields(TrainConfig) if flag.name != "config"]
    flags = []
    for key, value in values.items():
        if key not in allowed:
            near = nearest(str(key), allowed)
            raise ValueError(f"config {path} has the unknown key {key!r}{near}; allowed: {', '.join(allowed)}")
        if key in _OF_SEVERAL_WORDS and isinstance(value, list) and value:
            flags += [f"--{key}", *map(str, value)]
            continue
        if isinstance(value, dict | list):
            raise ValueError(f"{key} in {path} is a {type(value).__name__}; allowed: one number or text")
        if value is not None:
            flags.append(f"--{key}={value}")
    return flags
