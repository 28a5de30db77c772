"""Parsers of flags that refuse in one line, and say how a flag of other trainers is called here."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn

# Chunked MLPs and the loss multiply with weights as they are, and the planner counts their bytes so.
_QUANTISED = (
    "nothing: weights are in 16 or 32 bits, because their products are computed in chunks, past the modules of "
    "bitsandbytes; --lora_r trains adapters beside weights that ZeRO-3 shards"
)
# Flags of transformers, TRL and peft, and how the same is said here.
_FLAGS_OF_OTHERS: Mapping[str, str] = {
    "model_name_or_path": "--model",
    "tokenizer_name": "--tokenizer",
    "tokenizer_name_or_path": "--tokenizer",
    "dataset_name": "--dataset",
    "dataset_config_name": "--dataset_config",
    "dataset_text_field": "--text_column",
    "dataset_train_split": "--dataset_split",
    "assistant_only_loss": "--loss_on assistant, which is the default for chats",
    "completion_only_loss": "--loss_on assistant, which is the default for prompts and completions, or all",
    "packing_strategy": "--too_long, which says whether a sample's end may cut a document",
    "train_file": "--dataset",
    "deepspeed": "--ds_config",
    "deepspeed_config": "--ds_config",
    "max_length": "--seq_len",
    "max_seq_length": "--seq_len",
    "max_seq_len": "--seq_len",
    "block_size": "--seq_len",
    "warmup_ratio": "--warmup_steps",
    "adam_beta": "--adam_beta1 and --adam_beta2",
    "resume_from_checkpoint": "--resume",
    "overwrite_output_dir": "another --output_dir",
    "eval_strategy": "--eval_steps",
    "save_strategy": "--save_steps",
    "use_peft": "--lora_r, or --peft_config with an adapter_config.json",
    "use_lora": "--lora_r, or --peft_config with an adapter_config.json",
    "lora_modules_to_save": "--peft_config with an adapter_config.json",
    "lora_target_parameters": "--peft_config with an adapter_config.json",
    "use_rslora": "--peft_config with an adapter_config.json",
    "use_dora": "--peft_config with an adapter_config.json",
    "adapter_name_or_path": "--adapter",
    "per_device_eval_batch_size": "--per_device_train_batch_size, which is that of evaluations too",
    "bf16": "bf16 in the DeepSpeed JSON",
    "fp16": "fp16 in the DeepSpeed JSON",
    "torch_dtype": "bf16 or fp16 in the DeepSpeed JSON",
    "dtype": "bf16 or fp16 in the DeepSpeed JSON",
    "optim_args": "params of optimizer in the DeepSpeed JSON",
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "add_new_tokens": "--add_tokens, or --add_special_tokens for control tokens",
    "added_tokens": "--add_tokens, or --add_special_tokens for control tokens",
    "special_tokens": "--add_special_tokens",
    "resize_vocab": "--add_tokens or --add_special_tokens, which also add rows to the model",
    "resize_token_embeddings": "--add_tokens or --add_special_tokens, which also add rows to the model",
    "gradient_checkpointing": "recompute in the 'mst' block of the DeepSpeed JSON",
    "attn_implementation": "attention in the 'mst' block of the DeepSpeed JSON",
    "sp_size": "sp_size in the 'mst' block of the DeepSpeed JSON",
    "hub_token": "hf auth login, or HF_TOKEN in the environment",
    "hub_strategy": "--push_to_hub, which uploads once, at the end",
    "metric_for_best_model": "nothing: it is the loss of evaluations",
    "greater_is_better": "nothing: the lowest loss of evaluations is the best",
    "logging_steps": "nothing: every step is logged",
    "run_name": "--output_dir, whose name the run has in reports",
}


def flag(default: Any, help: str, parse: Callable[[str], Any] | None = None, nargs: str | None = None) -> Any:
    """A field of a class of flags; `parse` replaces the field's type as the reader of the flag's text.

    Args:
        nargs: as argparse has it, where a flag takes several words; the value is then a list of them.
    """
    metadata: dict[str, Any] = {"help": help}
    if parse is not None:
        metadata["parse"] = parse
    if nargs is not None:
        metadata["nargs"] = nargs
    return field(default=default, metadata=metadata)


def joined(words: str | Sequence[str]) -> str:
    """One text of what is a list of words on the command line, and a text in a YAML file and in Python."""
    return words if isinstance(words, str) else ",".join(words)


def words_in(text: str) -> list[str]:
    """The words in `text`, which has commas or spaces between them."""
    return text.replace(",", " ").split()


def unknown_flag(word: str, names: Iterable[str]) -> ValueError:
    """What to say of a flag that is not among `names`: how it is called here, or which is alike."""
    name = word.partition("=")[0]
    known = _FLAGS_OF_OTHERS.get(name.lstrip("-").replace("-", "_"))
    # Without the dashes, which would make all flags somewhat alike.
    near = difflib.get_close_matches(name.lstrip("-"), list(names), n=1, cutoff=0.7)
    hint = f"; here it is {known}" if known else "".join(f"; nearest: '--{match}'" for match in near)
    return ValueError(f"unknown flag {name!r}{hint}; --help lists the flags")


class OneLineParser(argparse.ArgumentParser):
    """Raises a ValueError for flags that it refuses, where argparse would print the usage as well and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def print_help(self, file: Any = None) -> None:
        # argparse itself passes over a stream that cannot be written to.
        print(self.format_help(), end="", file=file or sys.stdout)
