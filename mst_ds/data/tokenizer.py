"""The tokenizer of a run: the model's own, or bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mst_ds.config import TrainConfig
from mst_ds.files.read_file import existing_file, read_text
from mst_ds.model_shape import require_no_pointers, shipped_model_config

END_OF_TEXT = "<|endoftext|>"
_MOST_NAMES = 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no files: ids 0 to 255 are the bytes of the UTF-8 text, 256 is `<|endoftext|>`.

    `<|endoftext|>` is the EOS, BOS and padding token. A document that spells it out gets its bytes, so no
    document can forge its own end, and every text comes back from its ids as it was.
    """
    backend = Tokenizer(models.BPE(vocab=_byte_symbols(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(config: TrainConfig, model_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """`--tokenizer`, else the model's own, with the tokens that are to be added and the chat template of
    `--chat_template_path`, if it is given; a shipped model config has none and reads bytes.

    Raises:
        ValueError: no tokenizer is found, it has no EOS token, or it has ids beyond those of the model, of tokens that
            are not to be added; or the file of the chat template cannot be read.
    """
    if config.tokenizer is None and shipped_model_config(config.model) is not None:
        name = "byte level"
        tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
    else:
        name = config.tokenizer or config.model
        tokenizer = _pretrained(name, trust_remote_code=config.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no EOS token to end a document with; allowed: one with eos_token")
    _add(tokenizer, config.add_special_tokens, is_special=True)
    _add(tokenizer, config.add_tokens, is_special=False)
    vocab_size = model_config.get_text_config().vocab_size
    ids = rows_for(tokenizer)
    beyond = {token: each for token, each in tokenizer.get_vocab().items() if each >= vocab_size}
    if beyond.keys() - set(config.added_tokens):
        first = sorted(beyond, key=beyond.__getitem__)[:_MOST_NAMES]
        more = " ..." if len(beyond) > _MOST_NAMES else ""
        raise ValueError(
            f"tokenizer {name!r} has {ids} ids, but model {config.model!r} has a vocab_size of {vocab_size}; "
            f"allowed: a tokenizer with at most {vocab_size} ids, such as the model's own, or --add_tokens or "
            f"--add_special_tokens {' '.join(map(repr, first))}{more}, which adds rows to the model"
        )
    if config.chat_template_path is not None:
        file = existing_file(config.chat_template_path, "chat_template_path", "the file of a chat template")
        tokenizer.chat_template = read_text(file)
    return tokenizer


def rows_for(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a model needs for it. The highest id counts, not the number of tokens: ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str] | None, *, is_special: bool) -> None:
    """One that is there already keeps its id.

    Raises:
        ValueError: a word is a control token of the tokenizer, which it would make a word in every text.
    """
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not is_special and (taken := [token for token in tokens or () if token in control]):
        raise ValueError(
            f"the added token {taken[0]!r} is a control token of the tokenizer; allowed: --add_special_tokens, or none"
        )
    tokenizer.add_tokens(list(tokens or ()), special_tokens=is_special)


def _pretrained(name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    fix = "allowed: --tokenizer with the Hugging Face id or folder of a tokenizer"
    if Path(name).is_dir():
        require_no_pointers(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"tokenizer {name!r} needs code that it brings itself, which is not run; allowed: --trust_remote_code "
                "true, where you trust that code, or another --tokenizer"
            ) from None
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer found at {name!r} ({reason}); {fix}") from error
    # For some architectures a folder without tokenizer files gives one that has only special tokens.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError(f"no tokenizer found at {name!r} (its vocabulary is empty); {fix}")
    return tokenizer


def _byte_symbols() -> dict[str, int]:
    """The character that `ByteLevel` writes for a byte, as in GPT-2: itself if printable, else from 256."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    substitutes = count(256)
    return {chr(byte if byte in printable else next(substitutes)): byte for byte in range(256)}
