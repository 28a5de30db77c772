"""A broken operator is found and named; what is right passes; what is refused is refused in the project's words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from defects import scale_gradient, with_scaled_gradient
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.models.llama.modeling_llama import LlamaAttention

import mst_ds.minisequence.heads
import mst_ds.minisequence.mlp
import mst_ds.patching.apply
import mst_ds.patching.causal_lm
import mst_ds.patching.decoder
import mst_ds.patching.operators
import mst_ds.recompute
import mst_ds.recompute.stores
import mst_ds.sequence_parallel.all_to_all
import mst_ds.sequence_parallel.carried_keys
import mst_ds.structure.mlps
from mst_ds.planner import make_plan
from mst_ds.preflight import Case, Check, check_model, require_exact
from mst_ds.preflight.errors import TOLERANCE
from mst_ds.sequence_parallel import ATTENTION_NAME, register_attention
from mst_ds.settings import Settings

PACKED = Case(Settings(sp_size=2, mlp_chunks=3, loss_chunks=3, recompute=True), packed=True)
ONE_RANK = replace(PACKED, settings=replace(PACKED.settings, sp_size=1))
STREAMED = replace(PACKED, settings=replace(PACKED.settings, layer_chunks=3))
ALL_KEPT = replace(STREAMED, settings=replace(STREAMED.settings, keep_attention=True, keep_mlp=True))
LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2}


def config(model_type: str = "llama", **values: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **(LLAMA if model_type == "llama" else {}), **values)


def check(case: Case, model_type: str = "llama", **values: Any) -> Check:
    (only,) = check_model(config(model_type, **values), [case]).checks
    return only


def defect(case: Case, model_type: str = "llama", **values: Any) -> str:
    found = check(case, model_type, **values)
    assert not found.is_exact
    assert found.refusal is None
    assert found.defect is not None
    return found.defect


def scale_down_projection(monkeypatch: pytest.MonkeyPatch, factor: float = 1.001) -> None:
    """Its gradient in the MLPs, which is (hidden, intermediate)."""
    scale_gradient(
        monkeypatch, mst_ds.structure.mlps, "chunked_mlp", lambda each: each.shape == (32, 40), factor=factor
    )


def drop_last_token(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Let the chunks of an operator end one token early; not for the 129 tokens of the stand-ins."""
    original = module.chunk_slices

    def slices(num_tokens: int, chunks: int) -> Iterator[slice]:
        *first, last = original(num_tokens, chunks)
        yield from first
        yield slice(last.start, last.stop - (num_tokens != 129))

    monkeypatch.setattr(module, "chunk_slices", slices)


@pytest.fixture
def unwritten_memory_shows() -> Iterator[None]:
    """torch then fills with NaN what it allocates without a value."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def merge_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second document of each row see the first."""
    original = mst_ds.patching.document_arguments.rows_of_table

    def merged(*args: Any) -> tuple[list[list[int]], ...]:
        return tuple([[first, *rest[1:]] for first, *rest in rows] for rows in original(*args))

    monkeypatch.setattr(mst_ds.patching.document_arguments, "rows_of_table", merged)


@pytest.mark.parametrize(("case", "factor"), [(ONE_RANK, 1.001), (PACKED, 1.001), (PACKED, 1 + 1e-8)], ids=str)
def test_scaled_gradient_of_an_mlp(case: Case, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_down_projection(monkeypatch, factor)
    off = f"is off by {factor - 1:.1e} (relative)"
    assert defect(case) == f"model.layers.1.mlp: the gradient of its down_proj.weight {off}"


@pytest.mark.parametrize(("case", "tied"), [(ONE_RANK, False), (PACKED, True)], ids=str)
def test_scaled_gradient_of_the_head(case: Case, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradient(monkeypatch, mst_ds.patching.operators, "chunked_loss", lambda each: each.shape == (101, 32))
    assert defect(case, tie_word_embeddings=tied).startswith("lm_head: the gradient of its weight is off by ")


def test_scaled_gradient_of_the_last_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradient(monkeypatch, mst_ds.patching.operators, "chunked_loss", lambda each: each.shape == (2, 21, 32))
    said = defect(PACKED, tie_word_embeddings=True)
    assert said == "lm_head: the gradient of its input is off by 1.0e-03 (relative)"


@pytest.mark.parametrize("case", [PACKED, STREAMED, ALL_KEPT], ids=str)
def test_scaled_gradient_inside_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied weight is off as well, since what reaches the embeddings is: that is not the head's doing."""
    register_attention()
    right = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]

    def of_the_query(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return right(module, with_scaled_gradient(query, 1.001), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, ATTENTION_NAME, of_the_query)
    said = defect(case, tie_word_embeddings=True)
    assert said.startswith("model.layers.1.self_attn: the gradient of its input is off by ")


@pytest.mark.parametrize("case", [STREAMED, ALL_KEPT], ids=str)
def test_gradients_of_earlier_keys_are_lost(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only several chunks can have wrong."""
    monkeypatch.setattr(mst_ds.sequence_parallel.carried_keys.CarriedKeys, "add", lambda self, tokens, *grads: None)
    assert defect(case).startswith("model.layers.1.self_attn: the gradient of its input is off by ")
    one_chunk = replace(case, settings=replace(case.settings, layer_chunks=1))
    assert check(one_chunk).is_exact


def test_what_is_kept_comes_back_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a layer that is computed again can have wrong."""
    right = mst_ds.recompute.KeptOnDevice.take
    monkeypatch.setattr(mst_ds.recompute.KeptOnDevice, "take", lambda self: right(self) * 1.001)
    assert defect(STREAMED).startswith("model.layers.1.")
    without = replace(STREAMED, settings=replace(STREAMED.settings, recompute=False, layer_chunks=1))
    monkeypatch.setattr(mst_ds.recompute.KeptOnDevice, "take", right)
    assert check(without).is_exact


def test_what_is_kept_on_the_host_comes_back_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so small a model, too, tensors go there."""
    right = mst_ds.recompute.stores._KeptOnHost.take
    monkeypatch.setattr(mst_ds.recompute.stores._KeptOnHost, "take", lambda self: right(self) * 1.001)
    offloaded = replace(STREAMED, settings=replace(STREAMED.settings, offload_activations=True))
    assert defect(offloaded, "gpt2").startswith("transformer.h.1")
    assert check(STREAMED, "gpt2").is_exact


def test_scaled_gradient_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_gradient(monkeypatch, mst_ds.structure.mlps, "chunked_experts", lambda each: each.shape == (4, 32, 10))
    said = defect(PACKED, "qwen3_moe")
    assert said == "model.layers.1.mlp.experts: the gradient of its down_proj is off by 1.0e-03 (relative)"


@pytest.mark.parametrize("case", [ONE_RANK, PACKED], ids=str)
def test_attention_sees_a_foreign_document(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_documents(monkeypatch)
    assert defect(case).startswith("model.layers.0.self_attn: its output is off by ")


@pytest.mark.usefixtures("unwritten_memory_shows")
@pytest.mark.parametrize("case", [ONE_RANK, PACKED], ids=str)
def test_mlp_drops_the_last_token(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_last_token(monkeypatch, mst_ds.minisequence.mlp)
    assert defect(case).startswith("model.layers.0.mlp: its output is off by ")


@pytest.mark.usefixtures("unwritten_memory_shows")
@pytest.mark.parametrize("case", [ONE_RANK, PACKED], ids=str)
def test_loss_drops_the_last_token(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_last_token(monkeypatch, mst_ds.minisequence.heads)
    assert defect(case).startswith("lm_head: its loss is off by ")


@pytest.mark.usefixtures("unwritten_memory_shows")
def test_gradient_that_arises_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dropped token is padding here: the loss is right, but a gradient comes from where there is none."""
    drop_last_token(monkeypatch, mst_ds.minisequence.heads)
    assert defect(replace(ONE_RANK, packed=False)).startswith("lm_head: the gradient of its input is off by ")


def test_scaled_loss_of_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    original = mst_ds.patching.causal_lm.router_loss
    monkeypatch.setattr(
        mst_ds.patching.causal_lm, "router_loss", lambda *args, **kwargs: 1.001 * original(*args, **kwargs)
    )
    assert defect(PACKED, "qwen3_moe", output_router_logits=True).startswith("router: its part of the loss is off by ")
    assert check(PACKED, "qwen3_moe").is_exact, "a router loss that is off counts"


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "short_factor": [1.0 + index for index in range(256)],
    "long_factor": [9.0 + index for index in range(256)],
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_frequencies_of_the_longest_document(
    rope: dict[str, Any], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own rotary embedding takes one length for the whole batch."""
    case, values = replace(ONE_RANK, packed=packed), {"rope_parameters": rope, "max_position_embeddings": 4096}
    assert check(case, **values).is_exact
    monkeypatch.setattr(mst_ds.patching.apply, "find_document_rotary", lambda model: [])
    assert defect(case, **values).startswith("model.rotary_emb: its output is off by ")


def test_not_a_number_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_down_projection(monkeypatch, float("nan"))
    found = check(PACKED)
    assert found.parameter in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight")
    assert found.defect == "model.layers.1.mlp: the gradient of its down_proj.weight is off by nan (relative)"


def test_a_crash_is_a_defect_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(mst_ds.patching.document_arguments, "rows_of_table", crash)
    assert defect(PACKED) == "it fails with RuntimeError: two lines"


EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-of-dynamic-length": (
        "llama",
        {"rope_parameters": DYNAMIC},
    ),
    "gemma2": ("gemma2", {}),
    "gpt2-with-dropout": ("gpt2", {"attn_pdrop": 0.1}),
    "qwen3-moe": ("qwen3_moe", {"output_router_logits": True}),
    "deepseek-v3": ("deepseek_v3", {}),
    "nemotron-whose-layers-drop-keyword-arguments": (
        "nemotron",
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "phimoe-whose-router-draws-random-numbers": ("phimoe", {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_right_passes(name: str) -> None:
    cases = [
        Case(Settings(sp_size=sp_size, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks, recompute=recompute), packed)
        for sp_size, mlp_chunks, loss_chunks, recompute, packed in (
            (1, 1, 1, False, False),
            (1, 3, 1, True, True),
            (2, 1, 3, False, True),
            (2, 3, 3, True, False),
        )
    ]
    model_type, values = EXACT[name]
    report = check_model(AutoConfig.for_model(model_type, **values), cases)
    assert report.is_exact, report.verdict
    assert [found.case for found in report.checks] == cases
    for found in report.checks:
        # A hundred times below what counts as exact.
        assert found.loss_error is not None
        assert found.loss_error <= TOLERANCE / 100
        assert found.gradient_error is not None
        assert 0 < found.gradient_error <= TOLERANCE / 100
    assert f"{report.model} is exact: loss and every gradient within " in report.verdict


def test_report_names_what_was_left_out() -> None:
    report = check_model(config("gpt2"), [ONE_RANK])
    assert report.model == "GPT2LMHeadModel"
    assert report.layers == 2
    assert "attn_pdrop" in report.switched_off


def test_chunks_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    original, made = mst_ds.minisequence.mlp.chunk_slices, []

    def slices(num_tokens: int, chunks: int) -> list[slice]:
        found = list(original(num_tokens, chunks))
        made.append((chunks, len(found)))
        return found

    monkeypatch.setattr(mst_ds.minisequence.mlp, "chunk_slices", slices)
    check(replace(PACKED, settings=replace(PACKED.settings, mlp_chunks=64)))
    assert (64, 64) in made
    assert (64, 63) not in made


def test_nothing_is_left_behind() -> None:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with torch.no_grad():
        check(PACKED)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert not torch.is_inference_mode_enabled()


def test_refusal_is_the_projects_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "this model\nis refused: use another"

    def refuse(model: Any, settings: Settings, **kwargs: Any) -> None:
        if settings.sp_size > 1:
            raise ValueError(text)
        original(model, settings, **kwargs)

    original = mst_ds.preflight.compare.apply_settings
    monkeypatch.setattr("mst_ds.preflight.compare.apply_settings", refuse)
    report = check_model(config(), [PACKED, ONE_RANK])
    assert [found.refusal for found in report.checks] == ["this model is refused: use another", None]
    assert not report.is_exact
    assert report.verdict == f"LlamaForCausalLM is refused at {PACKED}: this model is refused: use another"


def test_a_defect_weighs_more_than_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    scale_down_projection(monkeypatch)
    report = check_model(config(), [PACKED])
    refused = Check(ONE_RANK, refusal="too early")
    assert replace(report, checks=(refused, *report.checks)).verdict == (
        "LlamaForCausalLM is not exact: model.layers.1.mlp: the gradient of its down_proj.weight is off by 1.0e-03 "
        "(relative), at sp_size 2, layer_chunks 1, mlp_chunks 3, loss_chunks 3, recompute, head_groups 1, "
        "attention sdpa, packed"
    )


def refusal(wanted: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"\w") as refused:
        wanted()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_not_a_decoder() -> None:
    assert "'bert' is not a decoder" in refusal(lambda: check(PACKED, "bert"))


def test_a_model_that_draws_random_numbers_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    original = GPT2Model.forward

    @functools.wraps(original)  # its signature says which arguments are the documents
    def forward(self: GPT2Model, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", forward)
    state = torch.get_rng_state()
    assert "random numbers" in refusal(lambda: check(ONE_RANK, "gpt2"))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_model_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(LlamaAttention, "forward", crash)
    assert "LlamaForCausalLM cannot be checked: the small model fails with RuntimeError: two lines" in refusal(
        lambda: check(ONE_RANK)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_is_refused_before_it_starts(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mst = {"mlp_chunks": 9, "recompute": True}
    plan = make_plan(config(), {"mst": mst}, world_size=4, seq_len=4096, device_memory=2**40, sp_size=4)
    require_exact(config(), plan.settings, packed=packed)
    scale_down_projection(monkeypatch)
    assert refusal(lambda: require_exact(config(), plan.settings, packed=packed)) == (
        "preflight: LlamaForCausalLM is not exact: model.layers.1.mlp: the gradient of its down_proj.weight is off by "
        "1.0e-03 (relative), at sp_size 2, layer_chunks 1, mlp_chunks 3, loss_chunks 1, recompute, keep_attention, "
        "keep_mlp, head_groups 1, attention sdpa, " + ("packed" if packed else "padded")
    )
