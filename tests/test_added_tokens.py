"""Tokens that are added: to the tokenizer, and as rows to the model, which plan, loss and saved model then have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plain_model import loss_and_gradients
from tiny import tiny_llama
from trainings import Training, assert_same_weights, losses
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from mst_ds.config_parser import parse_train_config
from mst_ds.data import byte_tokenizer, load_tokenizer, load_training_data
from mst_ds.engine import Launch, prepare
from mst_ds.model_shape import load_model_config

TOKENS = ("--add_tokens", "gather", "scatter", "--add_special_tokens", "<|sep|>")


def flags(folder: Path, *more: str, tied: bool = False) -> list[str]:
    """A model with a row for each token of its tokenizer, and a text that spells out those which are added."""
    tiny_llama(vocab_size=257, tie_word_embeddings=tied).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = "All ranks gather what others scatter<|sep|> and scatter what they gather."
    (folder / "text.txt").write_text(text, encoding="utf-8")
    own = ["--model", str(folder / "model"), "--dataset", str(folder / "text.txt"), "--seq_len", "96"]
    own += ["--packing", "none", "--max_steps", "2", "--learning_rate", "1e-2", "--weight_decay", "0"]
    return [*own, "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--preflight", "false", *TOKENS, *more]


def plain_losses(given: list[str], folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two steps of transformers' model, resized, and the weights that it has then."""
    config = parse_train_config(given)
    data = load_training_data(config, load_tokenizer(config, load_model_config(config.model)))
    assert len(data.train) == 1
    ids = data.train[0]["input_ids"]
    # Words are a token each; a control token that is spelled out in a text is only its letters.
    assert [(ids == token).sum() for token in (257, 258, 259)] == [0, 2, 2]
    batch = {name: data.train[0][name][None] for name in ("input_ids", "labels", "attention_mask")}
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    set_seed(config.seed)
    model.resize_token_embeddings(260)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for _ in range(2):
        found.append(float(loss_and_gradients(model, **batch)["loss"]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return found, dict(model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_run_with_added_tokens_is_that_of_the_resized_model(tmp_path: Path, tied: bool) -> None:
    """Under ZeRO-3, on two ranks, where each weight is in parts; and it goes on from its checkpoint."""
    given = flags(tmp_path, tied=tied)
    training = Training(tmp_path / "run", *given, "--save_steps", "1")
    assert training.end(limit=300) == [0, 0], training.output
    assert "the model has 3 new rows, around the mean of its 257" in training.output
    expected, weights = plain_losses(given, tmp_path)
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)

    saved = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert model.config.vocab_size == len(tokenizer) == 260
    assert len(tokenizer("gather", add_special_tokens=False)["input_ids"]) == 1
    for name, weight in model.state_dict().items():
        # What AdamW makes of gradients that differ in their last bits.
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)

    parts = Training(tmp_path / "parts", *given, "--resume", str(tmp_path / "run" / "checkpoints" / "step-00000001"))
    assert parts.end(limit=300) == [0, 0], parts.output
    assert_same_weights(tmp_path / "parts", tmp_path / "run")


def test_the_plan_counts_the_rows(tmp_path: Path) -> None:
    run = prepare(parse_train_config(flags(tmp_path)), Launch.from_environment({}))
    assert run.request.work.shape.vocab_size == run.model_config.vocab_size == 260
    assert run.stored_vocab_size == 257
    # A tokenizer that has them already gets them once.
    run.tokenizer.save_pretrained(tmp_path / "more")
    again = prepare(
        parse_train_config([*flags(tmp_path), "--tokenizer", str(tmp_path / "more")]), Launch.from_environment({})
    )
    assert again.identity == run.identity


def test_adapters_that_leave_the_rows_untrained_are_refused(tmp_path: Path) -> None:
    given = flags(tmp_path)
    adapters = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    for names, missing in ((None, "embed_tokens"), (["embed_tokens"], "lm_head"), (["embed_tokens", "lm_head"], None)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapters | {"modules_to_save": names}))
        config = parse_train_config([*given, "--peft_config", str(tmp_path / "adapter_config.json")])
        if missing is None:
            prepare(config, Launch.from_environment({}))
            continue
        with pytest.raises(ValueError, match=f"the adapters do not train {missing}, where the model has their rows; "):
            prepare(config, Launch.from_environment({}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--add_tokens", "a", "a"], "the added token 'a' is there twice; allowed: words, each once"),
        (["--add_tokens", "a", "--add_special_tokens", "a"], "the added token 'a' is there twice"),
        (["--add_tokens", " "], "the added token ' ' is white space"),
        (
            ["--add_tokens", "a", "--add-tokens=b"],
            "add_tokens is given twice; allowed: once, with all its words after it",
        ),
    ],
)
def test_tokens_that_are_refused(given: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_train_config(given)


def test_tokens_are_words_of_the_command_line_or_a_list_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("add_tokens: [a b, c]\nadd_special_tokens: <|x|>\n", encoding="utf-8")
    config = parse_train_config(["--config", str(tmp_path / "run.yaml")])
    assert (config.add_tokens, config.add_special_tokens) == (["a b", "c"], ["<|x|>"])
    assert config.added_tokens == ("a b", "c", "<|x|>")
    assert parse_train_config(["--add_tokens", "a b", "c"]).add_tokens == ["a b", "c"]
    assert parse_train_config([]).added_tokens == ()


def test_a_control_token_stays_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<x>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "own")
    given = [flag for flag in flags(tmp_path) if flag not in TOKENS]
    given += ["--tokenizer", str(tmp_path / "own"), "--add_tokens", "<x>"]
    with pytest.raises(
        ValueError, match="the added token '<x>' is a control token of the tokenizer; allowed: --add_sp"
    ):
        prepare(parse_train_config(given), Launch.from_environment({}))
