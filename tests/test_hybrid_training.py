"""The training command on models whose layers are not alike: the plain model's losses, and a folder that it loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import slow_but_for
from trainings import Training, losses
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mst_ds.data import byte_tokenizer

STEPS, SEQ_LEN, LEARNING_RATE = 3, 256, 1e-3
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**SIZES, **DELTA, "layer_types": ["linear_attention", "full_attention"]},
    # The last two layers read the keys of the first two.
    "gemma4_text": {
        **SIZES,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "sliding_window": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 259,
    },
}
# One sample; its shards meet at 128, inside the fourth document.
LENGTHS = (40, 7, 70, 33, 2, 100)
FLAGS = (
    *("--max_steps", str(STEPS), "--seq_len", str(SEQ_LEN)),
    *("--lr_scheduler_type", "constant", "--warmup_steps", "0", "--learning_rate", str(LEARNING_RATE)),
    *("--weight_decay", "0", "--max_grad_norm", "0"),
)


def write_model(folder: Path, model_type: str) -> None:
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        model_type,
        **MODELS[model_type],
        num_hidden_layers=len(MODELS[model_type]["layer_types"]),
        vocab_size=len(tokenizer),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (1, length), generator=generator) for length in LENGTHS]


def losses_of_each_document_alone(model: PreTrainedModel) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    num_items = sum(length - 1 for length in LENGTHS)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for ids in documents():
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        found.append(total)
    return found


@pytest.mark.parametrize("model_type", slow_but_for([], MODELS))
def test_the_command_trains_what_plain_transformers_trains_and_loads(tmp_path: Path, model_type: str) -> None:
    """On two ranks that share packed sequences, under ZeRO-3, with the preflight that comes before every run."""
    write_model(tmp_path / "model", model_type)
    with (tmp_path / "rows.jsonl").open("w", encoding="utf-8") as file:
        for ids in documents():
            print(json.dumps({"input_ids": ids[0].tolist()}), file=file)
    flags = ("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), *FLAGS)
    training = Training(tmp_path / "run", *flags)
    assert training.end(limit=300) == [0, 0], training.output
    assert "sp_size 2" in training.output
    assert "ZeRO-3" in training.output

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    expected = losses_of_each_document_alone(plain)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]
    for (_, found), loss in zip(losses(tmp_path / "run"), expected, strict=True):
        assert math.isclose(found, loss, rel_tol=1e-5)

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    files = [load_file(tmp_path / folder / "model" / "model.safetensors") for folder in (".", "run")]
    assert files[0].keys() == files[1].keys()
    # AdamW's step divides by the size of a gradient: of elements whose gradient is near 0 the rounding decides.
    for name, weight in plain.state_dict().items():
        assert (saved.state_dict()[name] - weight).norm() <= 1e-3 * weight.norm(), name
    prompt = documents()[0]
    with torch.no_grad():
        written = saved.generate(prompt, max_new_tokens=5, do_sample=False)
        assert torch.equal(written[:, -5:], saved(written[:, :-1]).logits[:, -5:].argmax(-1))
