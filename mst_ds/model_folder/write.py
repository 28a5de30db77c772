"""Writes a model folder, atomically renamed when all of it is on disk: nothing that was cut off looks whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mst_ds.files.whole_file import flush_to_disk
from mst_ds.model_shape import shipped_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What others read beside config, weights and tokenizer. Copied: transformers refuses to write some of what it reads.
_OF_PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_preprocessor_config.json", _OLD_TEMPLATE := "chat_template.json"),
)
_OF_SOURCE = ("generation_config.json", *_OF_PROCESSOR)

# Names that are nobody else's: folders of these names are removed.
_BESIDE = (".mst_ds_partial", ".mst_ds_replaced")


def write_model(
    model: Any,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    write_files: Callable[[Path], None],
    has_stored_names: bool = False,
) -> None:
    """Write what `from_pretrained` of the model's class loads into `folder`, in place of what is there.

    Args:
        model: of transformers or peft; its own tensors are not read.
        state: what is saved, by name.
        write_files: writes the other files into the folder that it gets, see `write_files_of`.
        has_stored_names: `state` is by the names that are written, see `WholeModel`; transformers would change others.

    Raises:
        OSError: it could not be written. What was in `folder` is as it was.
    """
    folder = folder.resolve()
    partial, replaced = (folder.with_name(folder.name + suffix) for suffix in _BESIDE)
    # Of a process that was killed, between two renames perhaps.
    if replaced.is_dir() and not folder.exists():
        replaced.replace(folder)
    for leftover in (partial, replaced):
        if leftover.is_dir():
            shutil.rmtree(leftover)
    try:
        partial.mkdir(parents=True)
        with _a_generation_config_that_can_be_saved(model):
            settings = {"save_original_format": False} if has_stored_names else {}
            model.save_pretrained(partial, state_dict=dict(state), **settings)
        write_files(partial)
        for path in (*partial.rglob("*"), partial):
            flush_to_disk(path)
        if folder.is_dir():
            folder.replace(replaced)
        partial.replace(folder)
        flush_to_disk(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors and tokenizers have errors of their own for a disk that is full.
        if isinstance(error, OSError) or (isinstance(error, Exception) and "os error" in str(error)):
            raise OSError(f"the model {folder} could not be written: {' '.join(str(error).split())}") from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write_files_of(model: Any, tokenizer: PreTrainedTokenizerBase, source: str, folder: Path) -> None:
    """What a model folder has beside its config and weights: tokenizer, and of a whole model what `source` has.

    Args:
        model: of transformers or peft.
        source: folder or Hugging Face id that the model was loaded from; one that has no such files will do.
    """
    tokenizer.save_pretrained(folder)
    if not getattr(model, "peft_config", None):
        copy_files_of(source, folder)


def copy_files_of(source: str, folder: Path) -> None:
    """What `source` has beside config, weights and tokenizer, see `write_files_of`."""
    has_template = (folder / "chat_template.jinja").exists()
    for name in _OF_SOURCE:
        file = _file_of(source, name)
        # That of the tokenizer may be another by now.
        if file is not None and not (has_template and name == _OLD_TEMPLATE):
            shutil.copyfile(file, folder / name)


def fetch_processor_of(source: str) -> None:
    """Get onto this machine what `copy_files_of` copies of a multimodal model on the Hugging Face hub.

    Raises:
        ValueError: the hub cannot be reached.
    """
    from transformers.utils.hub import cached_file

    if Path(source).expanduser().is_dir() or shipped_model_config(source) is not None:
        return
    for name in _OF_PROCESSOR:
        try:
            cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ValueError(f"{name} of model {source!r} cannot be had: {' '.join(str(error).split())}") from None


def _file_of(source: str, name: str) -> Path | None:
    """That file of a folder, or of a Hugging Face id where loading it has left it in the cache."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(source, name)
    except HFValidationError:  # a shipped config's name
        return None
    return Path(file) if isinstance(file, str) else None


@contextmanager
def _a_generation_config_that_can_be_saved(model: Any) -> Iterator[None]:
    """transformers refuses to save one that it loaded with a warning, such as a temperature without sampling."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    try:
        own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
