"""Samples as text: every document, and what is learned also where there is no colour."""

from __future__ import annotations

import json
from pathlib import Path

from rich.text import Text

from mst_ds.config import TrainConfig
from mst_ds.data import byte_tokenizer, load_training_data, shown_samples
from mst_ds.data.order import SampleOrder


def shown(path: Path, number: int, seq_len: int = 40, seed: int = 1) -> list[Text]:
    data = load_training_data(TrainConfig(dataset=str(path), seq_len=seq_len), byte_tokenizer())
    return list(shown_samples(data.train, byte_tokenizer(), number=number, seed=seed))


def test_documents_and_what_is_learned_of_them(tmp_path: Path) -> None:
    rows = [{"prompt": "Ask", "completion": "é\n[b]\x1b"}, {"prompt": "x", "completion": "y"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    (text,) = shown(path, 9)

    assert text.plain == (
        "sample 1 of 1: 2 document(s), 14 tokens, 10 learned, 26 of padding\n"
        "document 1: Ask⟦é\n[b]\\x1b<|endoftext|>⟧\n"
        "document 2: x⟦y<|endoftext|>⟧"
    )
    coloured = [text.plain[span.start : span.end] for span in text.spans]
    assert coloured == ["⟦é\n[b]\\x1b<|endoftext|>⟧", "⟦y<|endoftext|>⟧"]


def test_samples_are_the_first_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(letter * 4 for letter in "abcdefgh"), encoding="utf-8")

    texts = [text.plain for text in shown(tmp_path / "a.txt", 3, seq_len=4, seed=7)]

    order = SampleOrder(8, 7)
    letters = ["abcdefgh"[order[position]] for position in range(3)]
    said = [
        f"sample {number} of 8: 1 document(s), 4 tokens, 3 learned, 0 of padding\ndocument 1: {each}⟦{each * 3}⟧"
        for number, each in enumerate(letters, 1)
    ]
    assert texts == said
    assert shown(tmp_path / "a.txt", 0, seq_len=4) == []
