"""Small models and the plans of them, by term."""

from pathlib import Path

from transformers import Gemma2Config, GPTNeoXConfig, LlamaConfig, Qwen2MoeConfig

from mst_ds.config import GIB
from mst_ds.planner import make_plan

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 64, 192, 3, 1000
MODEL = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=VOCAB,
)
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": VOCAB,
}
# The first layer is dense; the others have 10 experts, 3 of them for each token, and one that all share.
EXPERTS = Qwen2MoeConfig(
    **SIZES,
    num_key_value_heads=2,
    mlp_only_layers=[0],
    num_experts=10,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    output_router_logits=True,
)
GEMMA2 = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)
GPT_NEOX = GPTNeoXConfig(**SIZES)
LAYER = HIDDEN * (5 * HIDDEN // 2 + 3 * INTERMEDIATE) + 2 * HIDDEN
PARAMETERS = 2 * VOCAB * HIDDEN + HIDDEN + LAYERS * LAYER


def plan_of(
    stage=3, *, model=MODEL, mst=None, dtype="bf16", world_size=4, seq_len=4000, sp_size=1, rank=0, **ds_config
):
    # DeepSpeed's own threshold would leave all of such small models whole on every rank.
    zero = {"stage": stage, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 500}
    zero |= {"stage3_param_persistence_threshold": 0} | ds_config.pop("zero", {})
    # One chunk of a layer: what several change is tested for itself.
    mst = {"recompute": True, "layer_chunks": 1} | (mst or {})
    ds_config = {dtype: {"enabled": True}, "zero_optimization": zero, "mst": mst} | ds_config
    return make_plan(
        model,
        ds_config,
        world_size=world_size,
        seq_len=seq_len,
        device_memory=GIB,
        sp_size=sp_size,
        rank=rank,
    )


WIDE = 2000  # so wide that the MLP is more than a norm, and its weights than a short sequence's attention
WIDE_NEOX = GPTNeoXConfig(**SIZES | {"intermediate_size": WIDE})


def wide_llama():
    return LlamaConfig(**MODEL.to_dict() | {"intermediate_size": WIDE})


def experts_with(**changes):
    return Qwen2MoeConfig(**EXPERTS.to_dict() | changes)


def terms_of(plan, phase_name):
    (phase,) = (phase for phase in plan.phases if phase.name == phase_name)
    names = [term.name for term in phase.terms]
    assert len(names) == len(set(names)), "a term counts once in a phase"
    return {term.name: term for term in phase.terms}


def bytes_of(plan, phase_name):
    return {name: term.bytes for name, term in terms_of(plan, phase_name).items()}


LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
# Of all layers with `llama_8b_plan`: layers x 2 x pairs of tokens x (16 query heads of a rank x 2 x 128).
ATTENTION = 32 * 2 * 2**33 * 16 * 2 * 128


def small_plan(ds_config=DS_CONFIGS / "zero3_mst.json", model="small_llama", **overrides):
    arguments = {"world_size": 2, "seq_len": 4096, "device_memory": 8 * GIB} | overrides
    return make_plan(model, ds_config, **arguments)


def choices_of(plan):
    return {choice.setting: choice for choice in plan.choices}


def llama_8b_plan(device_memory=80 * GIB, **mst):
    # One chunk of a layer: else plans that are compared differ in that, too.
    given = {"layer_chunks": 1, "mlp_chunks": 64, "loss_chunks": 64, "attention": "sdpa", "recompute": True}
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "mst": given | mst}
    return make_plan(LLAMA_8B, ds_config, world_size=8, seq_len=2**17, device_memory=device_memory, sp_size=2)
