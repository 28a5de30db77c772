"""Samples as people read them: their text, and what of it is learned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mst_ds.config import IGNORE_INDEX
from mst_ds.data.order import SampleOrder
from mst_ds.data.packing import PackedDataset
from mst_ds.data.sharding import Batch

_LEARNED = "bold green"
# A terminal would obey them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown_samples(
    dataset: PackedDataset, tokenizer: PreTrainedTokenizerBase, *, number: int, seed: int
) -> Iterator[Text]:
    """The first samples that a run of this seed trains on, each document of a sample under a line that counts it.

    What is learned is in colour and between ⟦ and ⟧; control characters are written as in Python's strings.
    """
    order = SampleOrder(len(dataset), seed)
    for position in range(min(number, len(dataset))):
        yield _shown(dataset[order[position]], tokenizer, f"sample {position + 1} of {len(dataset):,}")


def _shown(sample: Batch, tokenizer: PreTrainedTokenizerBase, name: str) -> Text:
    num_ids = int(sample["attention_mask"].sum())
    ids, labels, positions = (sample[key][:num_ids] for key in ("input_ids", "labels", "position_ids"))
    is_learned = labels != IGNORE_INDEX
    documents = (positions == 0).cumsum(0)
    text = Text(
        f"{name}: {int(documents[-1])} document(s), {num_ids:,} tokens, {int(is_learned.sum()):,} learned, "
        f"{len(sample['input_ids']) - num_ids:,} of padding"
    )
    tokens = zip(documents.tolist(), is_learned.tolist(), ids.tolist(), strict=True)
    for document, of_document in groupby(tokens, key=lambda token: token[0]):
        text.append(f"\ndocument {document}: ")
        for learned, run in groupby(of_document, key=lambda token: token[1]):
            decoded = tokenizer.decode([token for _, _, token in run], clean_up_tokenization_spaces=False)
            words = _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], str(decoded))
            text.append(f"⟦{words}⟧" if learned else words, _LEARNED if learned else None)
    return text
