"""What others have made runs no code: pickles of a model or an adapter (checkpoints: test_checkpoint_pickles.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import Bomb
from tiny import tiny_llama

from mst_ds.adapters import load_peft_config
from mst_ds.engine.launch import stay_on_node
from mst_ds.model_folder import find_weights, require_match


def test_a_models_pickle_runs_no_code(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "planted": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as error:
        weights = find_weights(str(tmp_path))
        assert weights is not None
        require_match(weights, model, dtype=torch.float32)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_an_adapters_pickle_runs_no_code(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"planted": Bomb(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="has been trained"):
        load_peft_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("given", "interface"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, "lo"),
        ({"MASTER_ADDR": "localhost"}, "lo"),
        ({"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "eth1"}, "eth1"),
        ({"MASTER_ADDR": "node7"}, None),
    ],
)
def test_ranks_of_one_node_listen_on_its_loopback(given: dict[str, str], interface: str | None) -> None:
    stay_on_node(given)
    assert given.get("GLOO_SOCKET_IFNAME") == interface
