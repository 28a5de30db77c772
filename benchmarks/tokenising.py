"""Tokenises text, and beside it with the tokenizer's library alone: python -m benchmarks.tokenising --tokenizer FOLDER

In rounds, one thread each, of the same documents: `mst_ds.data.tokenise`, which keeps control tokens out and makes a
table of ids, and `encode_batch` of tokenizers, which hands out lists. Time is the process's own, so
that other work of the machine does not count. Then a process of its own tokenises documents of a million tokens each,
and says how much memory was resident at its peak. Text is the source of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.report import RESULTS, write_json
from mst_ds.config import GIB, TrainConfig
from mst_ds.data import load_documents, tokenise

_BYTES_PER_CALL = 2**20  # of `encode_batch`: more at once takes more memory, and is not faster
_TOKENS = 2**20  # of a long document


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenising",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokenizer", required=True, help="Hugging Face id or folder.")
    parser.add_argument("--megabytes", type=float, default=8.0, help="Of text in each round.")
    parser.add_argument("--rounds", type=int, default=7, help="Interleaved rounds, each way once in each.")
    parser.add_argument("--long_documents", type=int, default=32, help="How many of a million tokens.")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu-tokenising.json")
    parser.add_argument("--of_file", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the library first encodes
    datasets.disable_progress_bars()
    if options.of_file:
        print(json.dumps(resident(options)))
        return
    texts = _texts(int(options.megabytes * 1e6))
    found = {"speed": speed(texts, options)}
    found["memory"] = _memory(texts, options, found["speed"]["num_tokens"])
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "of_file", "tokenizer")}
    write_json(options.output, torch.device("cpu"), settings, {"tokenising": found})
    for line in lines(found):
        Console().print(line, soft_wrap=True)


def lines(found: dict[str, Any]) -> list[str]:
    """What was measured, for people."""
    speed, memory = found["speed"], found["memory"]
    ratio = statistics.median(own / alone for own, alone in zip(speed["seconds"], speed["seconds_alone"], strict=True))
    megabytes = speed["num_bytes"] / 1e6
    return [
        f"{megabytes / statistics.median(speed['seconds']):.2f} MB/s, "
        f"{megabytes / statistics.median(speed['seconds_alone']):.2f} MB/s by encode_batch alone, one thread: "
        f"{ratio:.2f} times its time ({megabytes:.1f} MB of Python, {speed['vocab_size']} ids)",
        f"{memory['num_documents']} documents of {memory['fewest_tokens']:,} tokens or more: "
        f"{memory['peak_bytes'] / GIB:.2f} GiB resident at the peak, {memory['bytes_before'] / GIB:.2f} before",
    ]


def _texts(num_bytes: int) -> list[str]:
    texts: list[str] = []
    length = 0
    for text in load_documents(TrainConfig(dataset="python_stdlib"))["text"]:
        texts.append(text)
        length += len(text.encode())
        if length >= num_bytes:
            break
    return texts


def speed(texts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways by round."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    documents = datasets.Dataset.from_dict({"text": list(texts)})
    calls = _calls(texts)

    def alone() -> int:
        return sum(
            len(each.ids)
            for call in calls
            for each in tokenizer.backend_tokenizer.encode_batch(call, add_special_tokens=False)
        )

    def whole() -> int:
        # Documents in memory have no cache.
        return sum(map(len, tokenise(documents, tokenizer).with_format("arrow")[:]["input_ids"]))

    seconds: dict[str, list[float]] = {"seconds": [], "seconds_alone": []}
    for _ in range(options.rounds):
        for name, function in (("seconds_alone", alone), ("seconds", whole)):
            took, num_tokens = _timed(function)
            seconds[name].append(took)
    num_bytes = sum(len(text.encode()) for text in texts)
    return {**seconds, "num_bytes": num_bytes, "num_tokens": num_tokens, "vocab_size": len(tokenizer)}


def _calls(texts: Sequence[str]) -> list[list[str]]:
    calls: list[list[str]] = [[]]
    length = 0
    for text in texts:
        if length > _BYTES_PER_CALL:
            calls.append([])
            length = 0
        calls[-1].append(text)
        length += len(text.encode())
    return calls


def _timed(function: Callable[[], int]) -> tuple[float, int]:
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


def _memory(texts: Sequence[str], options: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    whole = "\n".join(texts)
    characters = int(len(whole) / num_tokens * _TOKENS * 1.1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            for number in range(options.long_documents):
                start = number * len(whole) // options.long_documents
                text = (whole[start:] + whole * (characters // len(whole) + 1))[:characters]
                print(json.dumps({"text": text}), file=stream)
        command = [sys.executable, "-m", "benchmarks.tokenising", "--tokenizer", options.tokenizer]
        environment = os.environ | {"HF_DATASETS_CACHE": folder}
        done = subprocess.run([*command, "--of_file", str(file)], check=True, capture_output=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def resident(options: argparse.Namespace) -> dict[str, Any]:
    """What this process has in memory at its peak while it tokenises a file, and what it had before."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    before = _peak_resident()
    tokens = tokenise(load_documents(TrainConfig(dataset=options.of_file)), tokenizer)
    lengths = [len(ids) for ids in tokens.with_format("arrow")[:]["input_ids"]]
    return {
        "bytes_before": before,
        "peak_bytes": _peak_resident(),
        "num_documents": len(lengths),
        "fewest_tokens": min(lengths),
    }


def _peak_resident() -> int:
    """Bytes. Not by getrusage, which counts the process that this one was forked from as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


if __name__ == "__main__":
    main()
