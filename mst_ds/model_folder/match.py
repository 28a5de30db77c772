"""Whether weights are those that a model needs, by their names, shapes and dtypes: before any of them is read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mst_ds.adapters import model_on_meta
from mst_ds.dtypes import HALVES, dtype_name
from mst_ds.model_folder.contents import Weights, first_names
from mst_ds.model_folder.generation import generation_config
from mst_ds.model_folder.tensors import StoredTensors
from mst_ds.model_folder.whole import WholeModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

# Others are quantised, or no weights at all.
_STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONVERSION_ROW = re.compile(r"^(\S+)\s*\|.*CONVERSION", re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Difference:
    """How weights differ from what a model needs: the names of tensors, each sorted.

    Args:
        missing, unexpected: the model needs them and has them not, and the other way round.
        mismatched: of another shape; with both shapes.
        unconverted: made of several stored ones, which do not fit together.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unconverted: tuple[str, ...] = ()

    @classmethod
    def of(cls, loading_info: Mapping[str, Any]) -> Difference:
        """From what transformers reports of loading a model."""
        return cls(
            missing=tuple(sorted(loading_info["missing_keys"])),
            unexpected=tuple(sorted(loading_info["unexpected_keys"])),
            mismatched=tuple(
                f"{name} {tuple(stored)} for {tuple(needed)}"
                for name, stored, needed in sorted(loading_info["mismatched_keys"])
            ),
        )

    def require_none(self, source: str, *, head: Iterable[str], new_lm_head: bool) -> None:
        """Refuse weights that are not the model's.

        Args:
            source: where they are from, for the error.
            head: names of the LM head's own parameters.
            new_lm_head: whether the head is to start from random values, so that it must be missing.

        Raises:
            ValueError: there is a difference, or no head is missing where a new one is asked for.
        """
        missing = tuple(name for name in self.missing if not (new_lm_head and name in head))
        kinds = (
            ("missing", missing),
            ("of no use to the model", self.unexpected),
            ("of another shape", self.mismatched),
            ("not of one shape with others of their kind", self.unconverted),
        )
        found = [f"{len(names)} {kind}: {first_names(list(names))}" for kind, names in kinds if names]
        if found:
            only_head = set(head) >= set(missing) == set(self.missing) and len(found) == 1 and bool(missing)
            fix = ", or --new_lm_head true for a head of random values" if only_head else ""
            raise ValueError(
                f"the weights of model {source!r} are not what its config.json describes ({'; '.join(found)}); "
                f"allowed: weights and config of one model{fix}"
            )
        if new_lm_head and not set(head) & set(self.missing):
            raise ValueError(
                f"new_lm_head is true, but model {source!r} has a head or ties it to its embeddings; allowed: a model "
                "whose weights lack the head, or no --new_lm_head"
            )


def require_match(
    weights: Weights, model: PreTrainedModel, *, dtype: torch.dtype, new_lm_head: bool = False
) -> tuple[str, ...]:
    """Compare weights with what a model needs, as transformers will load them but without reading their values.

    Args:
        model: of the class and with the config that will be loaded.
        dtype: that it will be loaded in.
        new_lm_head: whether the LM head starts from random values.

    Returns:
        What a user should know of the weights, a line each.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or of a dtype that holds no weights; or two that
            the config ties differ; or transformers does not read how the model generates, which it loads with them.
    """
    generation_config(weights.source)
    headers = weights.plain_headers(dtype)
    loaded, difference = _load_on_meta(weights.source, model, headers, dtype)
    difference.require_none(weights.source, head=head_names(loaded), new_lm_head=new_lm_head)
    _require_dtypes(weights.source, loaded, headers, dtype, difference)
    _require_tied(weights, loaded)
    notes = []
    if weights.quantization is not None:
        notes.append(f"weights are {weights.quantization.method.upper()}; trained and saved as {dtype_name(dtype)}")
    elif dtype == torch.float32 and (halves := {header.dtype for header in headers.values()} & HALVES):
        names = " and ".join(sorted(map(dtype_name, halves)))
        notes.append(
            f"weights are {names}; trained and saved as fp32, twice the size: bf16 or fp16 in the DeepSpeed JSON "
            "keeps 16 bits"
        )
    if rounded := [name for name, header in headers.items() if header.dtype == torch.float64]:
        notes.append(f"{len(rounded)} weights are float64, such as {rounded[0]}; rounded to {dtype_name(dtype)}")
    if new_lm_head:
        notes.append("the LM head starts from random values")
    return tuple(notes)


def find_whole(
    weights: Weights | None,
    whole_config: PreTrainedConfig,
    language_config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    seed: int = 0,
) -> WholeModel:
    """A multimodal model whose language model is trained, with the names by which files have its tensors.

    Args:
        weights: the multimodal model's, which `require_match` has found right; None: random ones.
        language_config: see `mst_ds.model_shape.language_config`; as the weights are.
        dtype: of training.
        seed: of random weights.

    Raises:
        ValueError: it has no part that is such a language model, or the weights of it are not all that this needs.
    """
    language = model_on_meta(language_config, None)[0]
    whole = WholeModel.of(whole_config, language, weights, dtype=dtype, seed=seed)
    if weights is not None:
        loaded, difference = _load_on_meta(
            weights.source, language, whole.language_part(weights.plain_headers(dtype)), dtype
        )
        # What the whole model lacks, too, is a head that is new.
        head = head_names(loaded)
        difference.require_none(weights.source, head=head, new_lm_head=set(difference.missing) == set(head))
    return whole


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The LM head's own parameters."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    return tuple(f"{name}.{own}" for name in names for own, _ in head.named_parameters())


def _load_on_meta(
    source: str, model: PreTrainedModel, headers: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[PreTrainedModel, Difference]:
    """What the loader of transformers itself makes of these tensors, renamed and merged; nothing has memory."""
    load: Any = type(model).from_pretrained  # a pair, with its loading_info, which its annotation does not know
    with _logged_reports() as reports:
        try:
            loaded, info = load(
                None,
                config=model.config,
                state_dict=dict(headers),
                device_map={"": "meta"},
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            rows = _CONVERSION_ROW.findall(_STYLE.sub("", "\n".join(reports)))
            reason = " ".join(str(error).split())
            return model, Difference(unconverted=tuple(rows) or (reason,))
        except Exception as error:  # a model's own code may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"the weights of model {source!r} cannot be compared with its config: {reason}") from error
    return loaded, Difference.of(info)


@contextmanager
def _logged_reports() -> Iterator[list[str]]:
    """What transformers would print of loading: tables of many lines, and a bar."""
    from transformers.utils import logging as of_transformers

    logger = logging.getLogger("transformers.modeling_utils")
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        reports.append(record.getMessage())
        return False

    shows_bar = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    logger.addFilter(keep)
    try:
        yield reports
    finally:
        logger.removeFilter(keep)
        if shows_bar:
            of_transformers.enable_progress_bar()


def _require_dtypes(
    source: str, model: PreTrainedModel, headers: Mapping[str, Tensor], dtype: torch.dtype, difference: Difference
) -> None:
    """Whole numbers and 8 bits of floating point would be taken for the weights that they only stand for."""
    odd = {name: header.dtype for name, header in headers.items() if header.dtype not in _STORED_DTYPES}
    whole = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    odd = {name: found for name, found in odd.items() if name not in whole}
    if not odd:
        return
    # Masks of old checkpoints are loaded into nothing: without them nothing more is missing.
    others = {name: header for name, header in headers.items() if name not in odd}
    without = _load_on_meta(source, model, others, dtype)[1]
    if set(without.missing) - set(difference.missing) or without.unconverted or without.mismatched:
        name, found = next(iter(odd.items()))
        raise ValueError(
            f"the weights of model {source!r} are not of floating point, but {dtype_name(found)} ({len(odd)} of them: "
            f"{first_names(list(odd))}), and no quantization_config in its config.json says what {name} stands for; "
            "allowed: weights in float32, bfloat16 or float16"
        )


def _require_tied(weights: Weights, model: PreTrainedModel) -> None:
    """Weights that the config ties are one to the run, whatever two values they have in the files.

    Raises:
        ValueError: they have two.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [(one, other) for one, other in tied.items() if {one, other} <= weights.headers.keys()]
    if not pairs:
        return
    with StoredTensors(weights.files) as stored:
        for one, other in pairs:
            if not torch.equal(stored[one], stored[other]):
                raise ValueError(
                    f"the config.json of model {weights.source!r} ties {one} to {other}, but its weights hold two that "
                    'differ; allowed: "tie_word_embeddings": false in the config, or one of them'
                )
