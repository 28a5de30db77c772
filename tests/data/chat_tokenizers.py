"""A small tokenizer with the control tokens of a chat template, and the templates of `chat_templates`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from small_tokenizers import SPECIAL, small_tokenizer
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).with_name("chat_templates")
_IM = ("<|im_start|>", "<|im_end|>")
# Of each template its control tokens, the last of which is EOS.
CONTROL: dict[str, tuple[str, ...]] = {
    "chatml": _IM,
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen3": _IM,
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]", "</s>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "channels": ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "smollm3": _IM,
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
}
# Tokens of theirs that are not special.
_ADDED = ("<tool_call>", "</think>")
# Which of `small_tokenizers` has the parts of the model's own.
_KIND = {"llama3": "llama3", "gemma3": "gemma", "mistral": "mistral", "channels": "gpt_oss", "deepseek": "deepseek"}


def chat_tokenizer(name: str, *, kind: str | None = None, has_template: bool = True) -> PreTrainedTokenizerFast:
    """kind: of `small_tokenizers`, which begin a text with <bos> here; default: the one that the model has."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_json(kind or _KIND.get(name, "qwen"))),
        unk_token="<unk>",
        bos_token="<bos>",
        pad_token="<eos>",
        eos_token=CONTROL[name][-1],
        additional_special_tokens=list(CONTROL[name]),
    )
    tokenizer.add_tokens(list(_ADDED))
    if has_template:
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


@cache
def _json(kind: str) -> str:
    backend = Tokenizer.from_str(small_tokenizer(kind).backend_tokenizer.to_str())
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=ids)
    text: str = backend.to_str()
    return text
