"""The command: 0 exact, 1 not exact or refused, 2 and one line on stderr for a request that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from defects import scale_gradient
from transformers import AutoConfig

import mst_ds.structure.mlps
from mst_ds.commands.preflight import main

LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def model(folder: Path, model_type: str, **values: Any) -> str:
    AutoConfig.for_model(model_type, **values).save_pretrained(folder / model_type)
    return str(folder / model_type)


def ds_config(folder: Path, **mst: Any) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps({"mst": mst}), encoding="utf-8")
    return str(path)


def test_llama_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", model(tmp_path, "llama", **LLAMA_3_1_8B)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    *table, verdict = output.out.splitlines()
    assert verdict.startswith("LlamaForCausalLM is exact: loss and every gradient within ")
    rows = [line for line in table if "sp_size" in line and "exact" in line]
    assert len(rows) == 8
    for words, count in (
        ("sp_size 1, layer_chunks 1,", 2),
        ("sp_size 1, layer_chunks 16,", 1),
        ("sp_size 2, layer_chunks 4,", 1),
    ):
        assert sum(words in line for line in rows) == count


def test_a_defect(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The hidden states, (batch, length, hidden); the stand-ins have another batch size.
    scale_gradient(monkeypatch, mst_ds.structure.mlps, "chunked_mlp", lambda each: len(each) == 2, factor=2.0)
    ds = ds_config(tmp_path, sp_size=1)
    assert main(["--model", model(tmp_path, "llama"), "--ds_config", ds]) == 1
    output = capsys.readouterr()
    assert output.err == ""
    assert "LlamaForCausalLM is not exact: model.layers.1.mlp: the gradient of its input is off by " in output.out
    assert "sp_size 2" not in output.out


def test_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", model(tmp_path, "falcon", alibi=True), "--packing", "none"]) == 1
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.splitlines()[-1].startswith("FalconForCausalLM is refused at sp_size ")
    assert "padded" in output.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "smal_llama"], "nearest: 'small_llama'"),
        (["--ds_config", "missing.json"], "'missing.json'"),
        (["--packing", "some"], "packing"),
        (["--chunks", "4"], "unknown flag '--chunks'"),
    ],
)
def test_bad_input(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("mst-preflight: error: ")
    assert output.err.count("\n") == 1
    assert says in output.err


def test_what_cannot_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", model(tmp_path, "bert")]) == 2
    assert "'bert' is not a decoder" in capsys.readouterr().err
