"""What holds for any plan: sums, and that more memory or more chunks never make anything worse."""

import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

from mst_ds.gpus import DEFAULT_GPU
from mst_ds.model_shape import ModelShape
from mst_ds.planner.mlp import mlp_steps
from mst_ds.planner.phases import layer_phase, loss_phase, step_phases
from mst_ds.planner.plan import longest_of_request
from mst_ds.planner.request import Request
from mst_ds.planner.types import total_bytes
from mst_ds.planner.workload import Workload
from mst_ds.settings import MstConfig, Settings
from mst_ds.topology import Topology
from mst_ds.zero import read_zero

NUM_CASES = 1000
FAMILIES = ("llama", "qwen3", "gemma2", "olmo2", "gpt_neox", "mixtral", "qwen2_moe")


def random_workload(draw):
    key_value_heads = draw.choice((1, 2, 4, 8))
    heads = key_value_heads * draw.choice((1, 2, 4))
    head_dim = draw.choice((32, 64, 128))
    fields = {
        "model_type": draw.choice(FAMILIES),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw.randrange(64, 30_000),
        "num_hidden_layers": draw.randint(1, 80),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "vocab_size": draw.randrange(1000, 260_000),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if fields["model_type"] == "mixtral":
        fields |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    if fields["model_type"] == "qwen2_moe":
        fields |= {"num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": draw.randrange(16, 8000)}
        fields |= {"shared_expert_intermediate_size": draw.randrange(16, 8000), "mlp_only_layers": [0]}
        fields |= {"decoder_sparse_step": 1, "output_router_logits": draw.random() < 0.5}
    dp_world_size = draw.choice((1, 2, 8, 64, 512))
    places = ("none", "cpu", "nvme")
    zero = {
        "stage": draw.randint(0, 3),
        "offload_optimizer": {"device": draw.choice(places)},
        "offload_param": {"device": draw.choice(places)},
    }
    ds_config = {
        draw.choice(("bf16", "fp16", "other")): {"enabled": True},
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": draw.randint(1, 4),
        "gradient_accumulation_steps": draw.randint(1, 3),
    }
    recompute = draw.random() < 0.7
    return Workload(
        ModelShape.from_fields(SimpleNamespace(**fields)),
        read_zero(ds_config, dp_world_size=dp_world_size),
        seq_len=draw.randrange(1, 2_000_000),
        settings=Settings(
            sp_size=draw.choice([size for size in (1, 2, 4, 8) if size <= min(heads, dp_world_size)]),
            recompute=recompute,
            keep_attention=recompute and draw.random() < 0.5,
            offload_activations=recompute and draw.random() < 0.5,
            keep_mlp=draw.random() < 0.5,
        ),
        reserve=draw.choice((0, 2**31)),
    )


def test_formulas_give_the_bytes_of_their_terms_which_add_up_to_the_phase():
    for seed in range(NUM_CASES):
        draw = random.Random(seed)
        work = random_workload(draw)
        chunks = {name: draw.randint(1, min(64, work.tokens)) for name in ("mlp_chunks", "loss_chunks")}
        for phase in step_phases(work.with_settings(**chunks)):
            for place, count in (("device", phase.device_bytes), ("host", phase.host_bytes)):
                assert sum(term.bytes for term in phase.terms if term.place == place) == count, seed
            for term in phase.terms:
                factors = [int(re.search(r" (\d+)$", factor)[1]) for factor in term.formula.split(" x ")]
                assert math.prod(factors) == term.bytes > 0, (seed, term)
            assert len({term.name for term in phase.terms}) == len(phase.terms), (seed, "a term counts once")


def test_more_chunks_never_need_more():
    for seed in range(NUM_CASES):
        draw = random.Random(seed)
        work = random_workload(draw)
        few = draw.randint(1, work.tokens)
        many = draw.randint(few, work.tokens)
        for backward in (False, True):
            needs = [[total_bytes(s.terms) for s in mlp_steps(work, n, backward=backward)] for n in (few, many)]
            assert all(less <= more for more, less in zip(*needs, strict=True)), seed
            phases = [layer_phase(work, n, backward=backward).device_bytes for n in (few, many)]
            assert phases[0] >= phases[1], seed
        assert loss_phase(work, few).device_bytes >= loss_phase(work, many).device_bytes, seed


def test_more_memory_never_gives_a_shorter_longest():
    for seed in range(20):  # each is two searches
        draw = random.Random(seed)
        work = random_workload(draw)
        topology = Topology(0, work.zero.dp_world_size, work.sp_size)
        memory = draw.randrange(2**30, 2**38)
        known = Request(topology, work, MstConfig(), (memory,), None, DEFAULT_GPU, times_are_known=False)
        more = memory + draw.choice((2**20, memory // 3))
        less, longest = (longest_of_request(replace(known, device_memory=(part,))) for part in (memory, more))
        assert less <= longest, seed
