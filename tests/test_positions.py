"""Models that have positions for so many tokens, and those that have learned so many."""

import json
import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from mst_ds import Settings, apply_settings
from mst_ds.commands import plan as plan_command
from mst_ds.config import GIB
from mst_ds.model_shape import ModelShape, load_model_shape, parse_rope_scaling, scale_rope, unknown_positions
from mst_ds.planner import longest_seq_len
from mst_ds.structure import position_table

POSITIONS = 16
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": POSITIONS, **SPECIAL}
OF_SIZE = {**SIZES, "max_position_embeddings": POSITIONS, **SPECIAL}
MODELS = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {**OF_SIZE, "num_heads": 2, "num_layers": 1, "attention_types": [[["global"], 1]]},
    "openai-gpt": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "n_head": 4, "rotary_dim": 4},
    "opt": {**OF_SIZE, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "biogpt": {**OF_SIZE, "intermediate_size": 16},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 30, "max_seq_len": POSITIONS, **SPECIAL},
}
WITHOUT = {
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30, **SPECIAL},
    "llama": {**OF_SIZE, "intermediate_size": 16},
}


@pytest.mark.parametrize("model_type", MODELS | WITHOUT)
def test_positions_are_as_many_as_the_model_takes(model_type):
    config = AutoConfig.for_model(model_type, **(MODELS | WITHOUT)[model_type])
    known = ModelShape.from_config(config).fixed_positions
    with torch.device("meta"):
        found = position_table(AutoModelForCausalLM.from_config(config))
    model = AutoModelForCausalLM.from_config(config)
    model(torch.ones(1, POSITIONS, dtype=torch.long))
    longer = torch.ones(1, POSITIONS + 1, dtype=torch.long)
    if model_type in WITHOUT:
        assert known is found is None
        model(longer)
        return
    assert known == POSITIONS
    # MPT computes its table in each forward.
    assert found == (None if model_type == "mpt" else POSITIONS)
    with pytest.raises((IndexError, RuntimeError)):
        model(longer)


def rope(rope_type, **values):
    return {"rope_type": rope_type, "rope_theta": 1e4, **values}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=8192)
CONFIGS = {
    "unscaled": ("llama", {"rope_parameters": rope("default")}, 8192),
    "extended in the config": ("llama", {"rope_parameters": YARN}, 32768),
    "by the factor": ("llama", {"rope_parameters": rope("linear", factor=2.0)}, 16384),
    "follows the length": ("llama", {"rope_parameters": rope("dynamic", factor=2.0)}, None),
    "kinds of layers": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": rope("default"), "full_attention": YARN}},
        32768,
    ),
    "ALiBi": ("falcon", {"alibi": True}, None),
    "a table": ("gpt2", {}, None),
    "no positions at all": ("jamba", {}, None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_positions_that_rope_is_meant_for(name):
    model_type, values, known = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **{"max_position_embeddings": 8192, **values})
    shape = ModelShape.from_config(config)
    assert shape.rotary_positions == known
    if known is not None:
        assert unknown_positions(shape, known) is None
        assert unknown_positions(shape, known + 1).startswith(
            f"warning: seq_len is {known + 1}, but the model's config knows {known} positions"
        )
    else:
        assert unknown_positions(shape, 2**30) is None


def test_what_the_warning_advises_ends_it():
    config = AutoConfig.for_model("llama", max_position_embeddings=8192)
    advice = unknown_positions(ModelShape.from_config(config), 20_000)
    (flag,) = re.findall("--rope_scaling ([^,]+),", advice)
    scale_rope(config, parse_rope_scaling(flag))
    assert unknown_positions(ModelShape.from_config(config), 20_000) is None
    advice = unknown_positions(ModelShape.from_config(config), 30_000)
    assert "raise the factor of its \"rope_parameters\", of type 'yarn'" in advice


def test_a_known_models_warning_advises_nothing_that_is_refused():
    """Its RoPE is scaled already, which a shape without `rope_parameters` would not say."""
    advice = unknown_positions(load_model_shape("meta-llama/Llama-3.1-8B"), 2**20)
    assert "raise the factor of its \"rope_parameters\", of type 'llama3'" in advice


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic"])
def test_scaled_rope_is_transformers_own(rope_type, tmp_path):
    """At four times the length that the model was made for, and after it was saved."""
    sizes = {**OF_SIZE, "intermediate_size": 32, "num_key_value_heads": 1, "initializer_range": 0.5}
    config = AutoConfig.for_model("llama", **sizes)
    scale_rope(config, parse_rope_scaling(f"{rope_type}:4"))
    values = {"yarn": {"original_max_position_embeddings": POSITIONS}}.get(rope_type, {})
    own = rope(rope_type, factor=4.0, **values)
    given = AutoConfig.for_model("llama", **sizes, rope_parameters=own)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(given).double()
    scaled = AutoModelForCausalLM.from_config(config).double()
    scaled.load_state_dict(plain.state_dict())
    scaled.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.randint(30, (1, 4 * POSITIONS))
    expected = cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:])
    unscaled = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).double()
    unscaled.load_state_dict(plain.state_dict())
    assert (cross_entropy(unscaled(input_ids=ids).logits[0, :-1], ids[0, 1:]) - expected).abs() > 1e-4
    for model in (scaled, saved):
        patched = apply_settings(model, Settings(layer_chunks=4, mlp_chunks=2, loss_chunks=4, recompute=True))
        torch.testing.assert_close(patched(input_ids=ids, labels=ids).loss, expected, rtol=1e-12, atol=0)


def test_layers_with_a_window_are_not_scaled():
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=8192)
    before = dict(config.rope_parameters["sliding_attention"])
    scale_rope(config, parse_rope_scaling("linear:8"))
    assert config.rope_parameters["sliding_attention"] == before
    assert config.rope_parameters["full_attention"]["factor"] == 8


LLAMA_3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize(
    ("model_type", "values", "words"),
    [
        ("gpt2", {}, "'gpt2' has no rotary embeddings that could be scaled"),
        ("falcon", {"alibi": True}, "'falcon' has no rotary embeddings"),
        ("llama", {"rope_parameters": LLAMA_3}, "is scaled already, by 'llama3' with a factor of 8.0"),
    ],
)
def test_what_cannot_be_scaled_is_refused(model_type, values, words):
    config = AutoConfig.for_model(model_type, **values)
    with pytest.raises(ValueError, match=re.escape(words)):
        scale_rope(config, parse_rope_scaling("yarn:4"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("yarm:4", "nearest: 'yarn'"),
        ("yarn", "such as yarn:4"),
        ("yarn:1", "a factor above 1"),
        ("linear:nan", "above 1"),
    ],
)
def test_what_is_no_scaling_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_rope_scaling(text)


def planned(capsys, folder, *flags):
    """The plan command's last line, or that of its refusal."""
    code = plan_command.main(("--model", str(folder), "--gpu", "H100", *flags))
    done = capsys.readouterr()
    return code, (done.err or done.out).splitlines()


def test_the_plan_of_a_model_with_a_table(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT, "n_positions": 2050}))
    code, (line,) = planned(capsys, tmp_path, "--seq_len", "2051")
    assert (code, line) == (
        2,
        "mst-plan: error: seq_len is 2051, but the model has 2050 positions; allowed: --seq_len 2050 or less",
    )
    assert planned(capsys, tmp_path, "--seq_len", "2050")[0] == 0
    code, lines = planned(capsys, tmp_path, "--max_seq_len")
    assert (code, lines[-1]) == (0, "longest sequence that fits: 2050 tokens; the model has no more positions")
    config = AutoConfig.for_model("gpt2", **GPT)
    assert longest_seq_len(config, {}, world_size=1, device_memory=GIB) == POSITIONS


def test_each_sequence_of_a_sample_has_positions_from_0(tmp_path, capsys):
    """A pair is two sequences, of all the positions that the model has."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT, "n_positions": 2048}))
    pairs = ("--objective", "dpo")
    assert planned(capsys, tmp_path, "--seq_len", "2048", *pairs)[0] == 0
    code, lines = planned(capsys, tmp_path, "--max_seq_len", *pairs)
    assert (code, lines[-1]) == (0, "longest sequence that fits: 2048 tokens (2K); the model has no more positions")
    code, (line,) = planned(capsys, tmp_path, "--seq_len", "2049", *pairs)
    assert (code, line) == (
        2,
        "mst-plan: error: seq_len is 2049, but the model has 2048 positions; allowed: --seq_len 2048 or less",
    )


def test_the_plan_of_a_model_whose_rope_knows_less(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **OF_SIZE, "intermediate_size": 16}))
    code, lines = planned(capsys, tmp_path, "--seq_len", "4K")
    assert code == 0
    assert lines[-2].startswith("warning: seq_len is 4096, but the model's config knows 16 positions")
    assert lines[-1].endswith("; by memory alone, the model's config knows 16 positions")
    plan_command.main(("--model", str(tmp_path), "--gpu", "H100", "--seq_len", "4K", "--json"))
    assert json.loads(capsys.readouterr().out)["warnings"] == [lines[-2]]
    plan_command.main(("--model", str(tmp_path), "--gpu", "H100", "--seq_len", "16", "--json"))
    assert json.loads(capsys.readouterr().out)["warnings"] == []
