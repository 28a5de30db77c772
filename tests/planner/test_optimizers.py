"""`--optim`: which optimizers there are, what a plan counts of them, and that a run with one goes on as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from planned import MODEL, PARAMETERS, bytes_of
from steps import build_engine, zero_block
from torch import Tensor, nn
from trainings import FLAGS, Training, assert_same_weights, losses
from transformers import LlamaConfig, LlamaForCausalLM

from mst_ds.config import GIB, TrainConfig
from mst_ds.config_parser import parse_train_config
from mst_ds.engine.optimizer import make_optimizer, require_installed
from mst_ds.planner import plan_of_request, read_request
from mst_ds.zero import read_resolved, read_zero


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optim", "adamw_torch_8bit"], "optim is 'adamw_torch_8bit': torchao leaves a shard in fp32 whose elements"),
        (["--optim", "muon"], "optim is 'muon': DeepSpeed makes it alone, .* of type Muon in the DeepSpeed JSON"),
        (["--optim", "adamw8bit"], "optim is 'adamw8bit'; allowed: adamw_torch, .*; nearest: 'adamw_8bit'"),
        (["--optim", "sgd", "--adam_beta2", "0.9"], "adam_beta2 is given, but optim is 'sgd', which has none"),
    ],
)
def test_what_no_run_makes_is_refused(flags: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_train_config(flags)
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mst_ds.engine.optimizer.find_spec", lambda name: None)
    require_installed("adamw_torch")
    with pytest.raises(ValueError, match="needs the package bitsandbytes: install it with pip install bitsandbytes"):
        require_installed("adamw_8bit")


@pytest.mark.parametrize("optim", ["adamw_8bit", "sgd"])
def test_states_that_stay_on_the_device(optim: str) -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ValueError, match=f"optim is '{optim}' and .*device is 'cpu', where DeepSpeed steps by its own"):
        read_zero(offload, dp_world_size=2, optim=optim)
    read_zero(offload, dp_world_size=2, optim="adamw_torch_fused")


def test_sgd_is_torch_s() -> None:
    """Shards of it are those of the whole: each element has its own step."""
    weights = [nn.Parameter(torch.arange(6.0).view(2, 3)), nn.Parameter(torch.ones(3))]
    model = nn.ParameterList(weights)
    config = TrainConfig(optim="sgd", learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(model, config, read_zero({}, dp_world_size=1, optim="sgd"))
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    optimizer.step()
    # What is no norm is decayed, with the gradient.
    assert weights[0].equal(before[0] - 0.1 * (2.0 + 0.5 * before[0]))
    assert weights[1].equal(before[1] - 0.2)
    assert not any(optimizer.state.values())
    assert "optimizer_moments" not in planned(3, 2, "sgd")


def planned(stage: int, world_size: int, optim: str) -> dict[str, int]:
    """The terms of a step by name; without ZeRO in fp32, as it is allowed."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    request = read_request(
        MODEL,
        {"zero_optimization": zero, "bf16": {"enabled": stage > 0}, "mst": {"recompute": True}},
        world_size=world_size,
        seq_len=64,
        device_memory=GIB,
        train=TrainConfig(optim=optim),
    )
    return bytes_of(plan_of_request(request), "optimizer_step")


def planned_moments(stage: int, world_size: int) -> int:
    terms = planned(stage, world_size, "adamw_8bit")
    return sum(terms.get(name, 0) for name in ("optimizer_moments", "optimizer_scales", "small_moments"))


def kept_moments(rank: int, world_size: int) -> dict[int, int]:
    """Bytes that a step has left in the optimizer's state at each stage, but for the two tables of its 256 values."""
    found = {}
    for stage in range(4):
        ds_config = {"zero_optimization": zero_block(stage), "bf16": {"enabled": stage > 0}}
        model = LlamaForCausalLM(LlamaConfig(**MODEL.to_dict()))
        zero = read_zero(ds_config, dp_world_size=world_size, optim="adamw_8bit")
        optimizer = make_optimizer(model, TrainConfig(optim="adamw_8bit"), zero)
        engine = build_engine(model, optimizer=optimizer, **ds_config)
        ids = torch.arange(8)[None]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        states = [value for state in optimizer.state.values() for name, value in state.items() if "qmap" not in name]
        found[stage] = sum(value.nbytes for value in states if isinstance(value, Tensor))
        engine.destroy()
    return found


def test_moments_of_8_bits_are_counted() -> None:
    pytest.importorskip("bitsandbytes")
    for found in run_ranks(kept_moments, 2, 2):
        for stage, kept in found.items():
            # What ranks have of the two groups differs by the rounding of their ranges.
            assert kept == pytest.approx(planned_moments(stage, 2), rel=1e-3), stage
    assert planned_moments(3, 2) < 2.1 * PARAMETERS / 2


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_8bit", "sgd"])
def test_a_run_goes_on_bit_by_bit(tmp_path: Path, optim: str) -> None:
    """Under ZeRO-3 on two ranks; on another number of ranks its states would not be those of their shards."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    flags = [*FLAGS, "--max_steps", "6", "--optim", optim]
    whole = Training(tmp_path / "whole", *flags)
    assert whole.end(limit=300) == [0, 0], whole.output
    parts = tmp_path / "parts"
    (parts / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step-00000003").rename(parts / "checkpoints" / "step-00000003")
    alone = Training(tmp_path / "alone", *flags, "--resume", str(parts / "checkpoints" / "step-00000003"), ranks=1)
    assert alone.end(limit=300) == [2], alone.output
    assert f"optim is {optim!r}, whose states are in" in alone.output
    again = Training(parts, *flags, "--resume", "auto")
    assert again.end(limit=300) == [0, 0], again.output
    assert losses(parts) == losses(tmp_path / "whole")[3:]
    assert_same_weights(parts, tmp_path / "whole")


def test_the_json_and_the_flag_agree() -> None:
    def resolved(kind: str, *flags: str) -> object:
        return read_resolved(
            {"optimizer": {"type": kind, "params": {"lr": "auto"}}},
            train=parse_train_config(list(flags)),
            hidden_size=8,
            num_attention_heads=2,
            world_size=1,
            ranks_per_node=None,
            has_accelerator=False,
        ).zero.optimizer_moments

    assert resolved("SGD") == 0
    assert resolved("SGD", "--optim", "sgd") == 0
    assert resolved("AdamW", "--optim", "adamw_torch_fused") == 2
    for kind, optim in (("AdamW", "adamw_8bit"), ("SGD", "adamw_torch"), ("AdamW", "sgd")):
        with pytest.raises(ValueError, match=f"optim is '{optim}' by the flag, but optimizer.type of .* is '{kind}'"):
            resolved(kind, "--optim", optim)
