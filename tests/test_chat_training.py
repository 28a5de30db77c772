"""The training command on chats: ranks find the same samples, learn only answers, and go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainings import FLAGS, Training, losses

from mst_ds.data import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|u|>' if m.role == 'user' else '<|a|>' }}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)


def write_data(folder: Path, name: str, answer: str) -> list[str]:
    """Chats whose questions are noise and whose answers are always the same, and a tokenizer for them; their flags."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
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
