"""Parsers of flags that refuse in one line, and say how a flag of other trainers is called here."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

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
    "use_peft": "--peft_config with an adapter_config.json",
    "use_lora": "--peft_config with an adapter_config.json",
    "lora_r": "--peft_config with an adapter_config.json",
    "lora_alpha": "--peft_config with an adapter_config.json",
    "lora_dropout": "--peft_config with an adapter_config.json",
    "lora_target_modules": "--peft_config with an adapter_config.json",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu in the DeepSpeed JSON",
    "per_device_eval_batch_size": "train_micro_batch_size_per_gpu in the DeepSpeed JSON",
    "gradient_accumulation_steps": "gradient_accumulation_steps in the DeepSpeed JSON",
    "bf16": "bf16 in the DeepSpeed JSON",
    "fp16": "fp16 in the DeepSpeed JSON",
    "torch_dtype": "bf16 or fp16 in the DeepSpeed JSON",
    "dtype": "bf16 or fp16 in the DeepSpeed JSON",
    "optim": "optimizer in the DeepSpeed JSON",
    "gradient_checkpointing": "recompute in the 'mst' block of the DeepSpeed JSON",
    "attn_implementation": "attention in the 'mst' block of the DeepSpeed JSON",
    "sp_size": "sp_size in the 'mst' block of the DeepSpeed JSON",
    "logging_steps": "nothing: every step is logged",
    "report_to": "nothing: metrics.jsonl and tensorboard/ are written",
}


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
