"""The training command on chats: ranks find the same samples, learn only answers, and go on where they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from plain_model import loss_and_gradients
from steps import adamw, build_engine, train, zero_block
from tiny import Outcome, tiny_llama, tiny_settings
from trainings import FLAGS, Training, losses

from mst_ds import apply_settings
from mst_ds.config import TrainConfig
from mst_ds.data import PackedDataset, ShardedLoader, byte_tokenizer, load_training_data
from mst_ds.topology import Topology

TEMPLATE = (
    "{% for m in messages %}{{ '<|u|>' if m.role == 'user' else '<|a|>' }}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)


def chat_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_data(folder: Path, name: str, answer: str) -> list[str]:
    """Chats whose questions are noise and whose answers are always the same, and a tokenizer for them; their flags."""
    chat_tokenizer().save_pretrained(folder / "tokenizer")
    with (folder / name).open("w", encoding="utf-8") as file:
        for number in range(60):
            question = str(number**9) * (number % 4 + 1)
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            print(json.dumps({"messages": chat * (number % 3 + 1)}), file=file)
    return ["--dataset", str(folder / name), "--tokenizer", str(folder / "tokenizer"), *FLAGS]


def run(output_dir: Path, *flags: str) -> Training:
    training = Training(output_dir, *flags)
    assert training.end(limit=300) == [0, 0], training.output
    return training


@pytest.mark.slow
def test_a_run_on_packed_chats_learns_answers_and_goes_on(tmp_path: Path) -> None:
    flags = write_data(tmp_path, "chats.jsonl", "always the same")
    flags += ["--learning_rate", "1e-2"]
    done = run(tmp_path / "whole", *flags)

    first, *_, last = [loss for _, loss in losses(tmp_path / "whole")]
    # Digits of the questions are noise of log(10) = 2.3 each, which no model can learn.
    assert first > 5
    assert last < 1.5
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text(encoding="utf-8"))
    # Each answer is 15 letters and EOS.
    assert summary["data"]["tokens_learned"] == 16 * (20 + 40 + 60)
    assert f"({summary['data']['tokens_learned']:,} learned)" in done.output

    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000009"
    run(tmp_path / "parts", *flags, "--resume", str(checkpoint))
    assert losses(tmp_path / "parts") == [each for each in losses(tmp_path / "whole") if each[0] > 9]


# Of question and answer, in turns: some span the border of the two shards, and no turn of a layer's chunks is even.
TURNS = [(3, 20), (9, 4, 5, 11), (1, 30), (12, 7), (5, 2, 2, 2, 8, 9), (7, 40)]


def chat(number: int, lengths: tuple[int, ...]) -> list[dict[str, str]]:
    letters = "abcdefghij"[number:] * 9
    return [
        {"role": ("user", "assistant")[turn % 2], "content": letters[turn : turn + length]}
        for turn, length in enumerate(lengths)
    ]


def packed_chats(folder: str) -> PackedDataset:
    """All chats in one sample."""
    data = load_training_data(TrainConfig(dataset=f"{folder}/chats.jsonl", seq_len=256), chat_tokenizer())
    assert (len(data.train), data.train.num_documents) == (1, len(TURNS))
    return data.train


def steps_on_packed_chats(rank: int, folder: str) -> Outcome:
    topology = Topology(rank, 2, 2)
    settings = tiny_settings(2, layer_chunks=3, mlp_chunks=2 + rank, loss_chunks=3, recompute=True)
    model = apply_settings(tiny_llama(vocab_size=259), settings, zero_stage=3)
    engine = build_engine(model, zero_optimization=zero_block(3, keep_gathered=True))
    loader = ShardedLoader(packed_chats(folder), topology, micro_batch_size=1, seed=0, layer_chunks=3)
    outcome = train(engine, [next(loader)], 3)
    engine.destroy()
    return outcome


def steps_on_each_chat() -> Outcome:
    """Three steps of the plain model, to which each conversation is given alone; ids and labels by hand."""
    model = tiny_llama(vocab_size=259)
    optimizer, losses_of_steps, first = adamw(list(model.parameters())), [], {}
    conversations = []
    for number, lengths in enumerate(TURNS):
        ids, labels = [], []
        for message in chat(number, lengths):
            is_answer = message["role"] == "assistant"
            content = [*message["content"].encode(), 256]
            ids += [258 if is_answer else 257, *content]
            labels += [-100, *(content if is_answer else [-100] * len(content))]
        conversations.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    num_items = sum(int((each["labels"] != -100).sum()) for each in conversations)
    for step in range(3):
        parts = [
            {
                name: value.clone()
                for name, value in loss_and_gradients(model, **each, num_items_in_batch=num_items).items()
            }
            for each in conversations
        ]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        losses_of_steps.append(total.pop("loss").item())
        for name, parameter in model.named_parameters():
            parameter.grad = total[name]
        if step == 0:
            first = {name: gradient.clone() for name, gradient in total.items()}
        optimizer.step()
    return Outcome(losses_of_steps, first)


def test_steps_on_packed_chats_in_shards_are_those_on_each_chat_alone(tmp_path: Path) -> None:
    """Under ZeRO-3, with chunks of layers: the whole way from messages to the third step's loss."""
    rows = [json.dumps({"messages": chat(number, lengths)}) for number, lengths in enumerate(TURNS)]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    packed_chats(str(tmp_path))  # read once, for both ranks
    expected = steps_on_each_chat()
    for outcome in run_ranks(steps_on_packed_chats, 2, str(tmp_path)):
        assert outcome.worst_gradient_error(expected)[0] <= 1e-5
        assert outcome.worst_loss_error(expected) <= 1e-5
