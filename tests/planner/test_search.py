"""Which settings the planner chooses: what is kept, groups of heads, chunk counts."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
from planned import LLAMA_8B
from transformers import LlamaConfig, MixtralConfig

from mst_ds.config import GIB
from mst_ds.model_shape import ModelShape
from mst_ds.planner.activations import attention_step
from mst_ds.planner.phases import layer_phase, loss_phase, step_phases
from mst_ds.planner.search import CHUNK_TOKENS_OF_GPU, MIN_CHUNK_TOKENS, choose_chunks, choose_settings
from mst_ds.planner.types import total_bytes
from mst_ds.planner.workload import Workload
from mst_ds.settings import MstConfig, Settings
from mst_ds.zero import read_zero

SHORT_AND_WIDE = LlamaConfig(
    hidden_size=64, intermediate_size=6400, num_hidden_layers=1, num_attention_heads=4, vocab_size=50000
)
EXPERTS = MixtralConfig(
    hidden_size=64, intermediate_size=6400, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)
HUGE = 10**15


def workload(model=LLAMA_8B, *, seq_len=65536, sp_size=1, stage=3, recompute=True):
    zero = read_zero(
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}},
        dp_world_size=8,
    )
    return Workload(ModelShape.from_config(model), zero, seq_len, Settings(sp_size=sp_size, recompute=recompute))


def auto(work, device_memory=HUGE):
    return choose_chunks(work, device_memory=device_memory, mlp_chunks="auto", loss_chunks="auto")


def peak(work, mlp_chunks, loss_chunks):
    phases = step_phases(work.with_settings(mlp_chunks=mlp_chunks, loss_chunks=loss_chunks))
    return max(phases, key=lambda phase: phase.device_bytes)


@pytest.mark.parametrize("seq_len", [1_000_000, 2_000_000])
def test_chunks_are_the_fewest_that_keep_mlp_and_loss_from_being_the_peak(seq_len):
    work = workload(seq_len=seq_len, sp_size=8)
    mlp_chunks, loss_chunks = auto(work)
    assert mlp_chunks > 1
    assert loss_chunks > 1
    for backward in (False, True):
        at_most, many = (layer_phase(work, chunks, backward=backward) for chunks in (mlp_chunks, 64 * mlp_chunks))
        assert at_most.device_bytes == many.device_bytes
    one_fewer = [layer_phase(work, mlp_chunks - 1, backward=backward) for backward in (False, True)]
    assert "mlp_chunk" in {term.name for phase in one_fewer for term in phase.terms}
    assert peak(work, mlp_chunks, loss_chunks).name != "loss"
    assert peak(work, mlp_chunks, loss_chunks - 1).name == "loss"


def test_what_needs_no_chunks_gets_one():
    narrow = LlamaConfig(
        hidden_size=512, intermediate_size=64, num_hidden_layers=8, num_attention_heads=8, vocab_size=300
    )
    assert auto(workload(narrow, seq_len=8192)) == (1, 1)


def test_where_unchunked_memory_prevails_chunks_stop_at_its_size():
    work = workload(SHORT_AND_WIDE, seq_len=100_000, stage=0)
    mlp_chunks, loss_chunks = auto(work)
    assert 1 < mlp_chunks < 100_000 // MIN_CHUNK_TOKENS
    assert 1 < loss_chunks < 100_000 // MIN_CHUNK_TOKENS


@pytest.mark.parametrize("model", [LLAMA_8B, SHORT_AND_WIDE, EXPERTS], ids=["llama_8b", "short_and_wide", "experts"])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_smaller_budget_never_has_fewer_chunks_and_is_met_with_the_fewest(model, recompute):
    work = workload(model, seq_len=100_000, recompute=recompute)
    roomy = auto(work)
    most = 100_000 // MIN_CHUNK_TOKENS
    top, floor = peak(work, *roomy).device_bytes, peak(work, most, most).device_bytes
    counts = []
    for budget in (top, (3 * top + floor) // 4, (top + floor) // 2, floor):
        mlp_chunks, loss_chunks = auto(work, budget)
        counts.append((mlp_chunks, loss_chunks))
        assert peak(work, mlp_chunks, loss_chunks).device_bytes <= budget
        if mlp_chunks > roomy[0]:
            fewer = [layer_phase(work, mlp_chunks - 1, backward=backward).device_bytes for backward in (False, True)]
            assert max(fewer) > budget
        if loss_chunks > roomy[1]:
            assert loss_phase(work, loss_chunks - 1).device_bytes > budget
    assert counts[0] == roomy
    for roomier, tighter in itertools.pairwise(counts):
        assert roomier[0] <= tighter[0]
        assert roomier[1] <= tighter[1]


def test_one_byte_less_than_a_layer_needs_takes_one_more_chunk():
    # On so short a shard the MLP's weight gradients exceed the rest of the layer: more chunks still help.
    work = workload(seq_len=65536, sp_size=8, recompute=False)
    roomy = auto(work)[0]
    needed = layer_phase(work, roomy, backward=True).device_bytes
    assert auto(work, needed)[0] == roomy
    assert auto(work, needed - 1)[0] == roomy + 1


def test_where_nothing_fits_no_chunks_are_added_that_do_not_help():
    work = workload(seq_len=1_000_000, sp_size=8)
    mlp_chunks, loss_chunks = auto(work, GIB)
    most = work.tokens // MIN_CHUNK_TOKENS
    assert peak(work, mlp_chunks, loss_chunks).device_bytes == peak(work, most, most).device_bytes
    # Attention is what does not fit: chunking the MLP further would only cost time.
    assert mlp_chunks == auto(work)[0]


@pytest.mark.parametrize("seq_len", [1, 7, MIN_CHUNK_TOKENS - 1, MIN_CHUNK_TOKENS, 1021, 100_000])
def test_no_chunk_is_shorter_than_the_floor(seq_len):
    for device_memory, sp_size in itertools.product((1, HUGE), (1, 4)):
        work = workload(SHORT_AND_WIDE, seq_len=seq_len, sp_size=sp_size)
        for chunks in auto(work, device_memory):
            assert 1 <= chunks <= work.tokens
            assert chunks == 1 or work.tokens // chunks >= MIN_CHUNK_TOKENS


@pytest.mark.parametrize(("seq_len", "expected"), [(1021, (1, 1)), (4097, (2, 2)), (65536, (32, 32))])
def test_chunks_are_shorter_than_a_gpu_prefers_only_where_memory_demands_it(seq_len, expected):
    work = workload(SHORT_AND_WIDE, seq_len=seq_len)
    preferring = partial(
        choose_chunks, work, mlp_chunks="auto", loss_chunks="auto", preferred_tokens=CHUNK_TOKENS_OF_GPU
    )
    # With all the memory that there is, others would take more.
    assert preferring(device_memory=HUGE) == expected
    assert all(more > fewer for more, fewer in zip(auto(work), expected, strict=True))
    needed, lowest = (peak(work, *counts).device_bytes for counts in (expected, auto(work, 1)))
    assert preferring(device_memory=needed) == expected
    # One byte less takes more chunks; whatever fits in the shortest chunks is found.
    assert preferring(device_memory=needed - 1) > expected
    for device_memory in (needed - 1, lowest):
        assert peak(work, *preferring(device_memory=device_memory)).device_bytes <= device_memory


def test_the_users_counts_stay():
    work = workload()
    choose = partial(choose_chunks, work, device_memory=1)
    assert choose(mlp_chunks=3, loss_chunks=65536) == (3, 65536)
    assert choose(mlp_chunks="auto", loss_chunks=5)[1] == 5
    assert choose(mlp_chunks=5, loss_chunks="auto")[0] == 5


@pytest.mark.parametrize("name", ["mlp_chunks", "loss_chunks"])
def test_more_chunks_than_tokens_are_refused(name):
    chunks = {"mlp_chunks": "auto", "loss_chunks": "auto"} | {name: 26}
    work = workload(seq_len=99, sp_size=4)
    with pytest.raises(
        ValueError, match=f"{name} is 26, more than the 25 tokens of a rank .*; allowed: 'auto' or 1 to 25"
    ):
        choose_chunks(work, device_memory=GIB, **chunks)
    assert choose_chunks(work, device_memory=GIB, **chunks | {name: 25})


def settings_of(work, *, device_memory=HUGE, host_memory=None, **mst):
    mst = MstConfig.from_dict(mst)
    return choose_settings(work, mst, device_memory=device_memory, host_memory=host_memory).settings


def test_what_has_the_same_settings_is_the_same_workload():
    """A search, a plan and its advice find what was computed for one another."""
    work = workload()
    again = work.with_settings(layer_chunks=2)
    assert again is work.with_settings(layer_chunks=2) is again.with_settings(mlp_chunks=3).with_settings(mlp_chunks=1)
    assert again.with_settings(layer_chunks=1) is work
    longer = replace(work, seq_len=2**17)
    assert longer.with_settings(layer_chunks=2) == replace(again, seq_len=2**17) != again


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 1},
        {"optimizer_offload": "cpu", "param_offload": "cpu"},
        {"dp_world_size": 64},
        {"dtype": "fp32"},
        {"micro_batch_size": 2},
    ],
)
def test_another_zero_setting_finds_what_is_computed_alike_and_nothing_else(changes):
    work = workload(sp_size=2).with_settings(keep_attention=True, offload_activations=True, layer_chunks=4)
    step_phases(work)
    other = replace(work.zero, **changes)
    found = step_phases(work.with_zero(other))
    assert found == step_phases(replace(work, zero=other)) != step_phases(work)
    assert (work.with_zero(other).computing is work.computing) == changes.keys().isdisjoint(
        {"dtype", "micro_batch_size"}
    )


NOTHING_TWICE = "nothing is computed twice"
MLP = "gate and up"


def kept_in(settings):
    """(keep_attention, offload_activations) and MLP if it is kept; None without recompute, or NOTHING_TWICE."""
    if not settings.recompute:
        return NOTHING_TWICE if settings.keep_mlp else None
    return (settings.keep_attention, settings.offload_activations, *[MLP] * settings.keep_mlp)


def peaks_by_kept(work):
    """The lowest peak of each way to keep, with one group of heads."""
    candidates = {
        None: work.with_settings(recompute=False),
        NOTHING_TWICE: work.with_settings(recompute=False, keep_mlp=True),
    }
    for attention, offload, mlp in itertools.product((True, False), repeat=3):
        kept = (attention, offload, *[MLP] * mlp)
        candidates[kept] = work.with_settings(keep_attention=attention, offload_activations=offload, keep_mlp=mlp)
    return {kept: peak(candidate, *auto(candidate, 1)).device_bytes for kept, candidate in candidates.items()}


def test_the_fastest_that_fits_is_chosen():
    work = workload(seq_len=500_000)
    lowest = peaks_by_kept(work)
    with_gate_and_up, everything = lowest[NOTHING_TWICE], lowest[None]
    on_device, all_on_host, with_mlp = lowest[True, False], lowest[True, True], lowest[True, False, MLP]
    inputs_on_device, inputs_on_host = lowest[False, False], lowest[False, True]
    in_32_chunks = peak(work.with_settings(keep_attention=True, keep_mlp=True), 32, 100).device_bytes
    assert inputs_on_host < all_on_host < inputs_on_device < on_device < everything < with_mlp < with_gate_and_up
    cases = [
        # With enough of it nothing is computed twice.
        (HUGE, None, NOTHING_TWICE),
        (with_gate_and_up, HUGE, NOTHING_TWICE),
        # Then projections are, which are fewer FLOPs than gate and up.
        (with_gate_and_up - 1, HUGE, (True, False, MLP)),
        (in_32_chunks, HUGE, (True, False, MLP)),
        # In the shortest chunks their sums take longer than gate and up.
        (with_mlp, HUGE, None),
        (everything, HUGE, None),
        # Else nothing leaves the device, and attention runs once.
        (everything - 1, HUGE, (True, False)),
        (on_device, HUGE, (True, False)),
        # Tight device, big host: attention still runs once.
        (on_device - 1, HUGE, (True, True)),
        (all_on_host, HUGE, (True, True)),
        # A device too tight for two layers of everything: layer inputs alone, on the host.
        (all_on_host - 1, HUGE, (False, True)),
        # A host that is unknown or too small for all of it: attention runs twice.
        (on_device - 1, None, (False, False)),
        (on_device - 1, GIB, (False, False)),
        # A host that holds the layer inputs alone, blocks of 2^32 bytes.
        (inputs_on_device - 1, 32 * 2**32, (False, True)),
    ]
    for device_memory, host_memory, expected in cases:
        # In one chunk of a layer: what several change follows.
        settings = settings_of(work, device_memory=device_memory, host_memory=host_memory, layer_chunks=1)
        assert kept_in(settings) == expected
        chosen = replace(work, settings=settings)
        assert peak(chosen, settings.mlp_chunks, settings.loss_chunks).device_bytes <= device_memory
    # In several attention still runs once where it would run twice.
    settings = settings_of(work, device_memory=all_on_host - 1, host_memory=HUGE)
    assert (kept_in(settings), settings.layer_chunks > 1) == ((True, True), True)


def test_no_recompute_has_the_chunks_of_any_other_setting():
    work = workload(seq_len=500_000)
    # As long as more chunks make it fit, they are preferred to recompute, and to computing gate and up again.
    lowest = peaks_by_kept(work)
    for device_memory, keep_mlp in ((HUGE, True), (lowest[NOTHING_TWICE], True), (lowest[None], False)):
        expected = work.with_settings(recompute=False, keep_mlp=keep_mlp)
        settings = settings_of(work, device_memory=device_memory)
        assert (settings.mlp_chunks, settings.loss_chunks) == auto(expected, device_memory)
        assert replace(settings, mlp_chunks=1, loss_chunks=1) == expected.settings


def test_kept_gate_and_up_need_no_more_chunks_than_they_are_large():
    """The MLP makes the peak by what it keeps, however short its chunks: two are enough."""
    work = workload(seq_len=500_000, recompute=False).with_settings(keep_mlp=True)
    assert auto(work)[0] == 2
    assert auto(work, peak(work, 2, 1000).device_bytes - 1)[0] > 2


def test_gate_and_up_are_kept_as_the_user_says():
    work = workload(seq_len=500_000)
    for device_memory in (1, HUGE):
        assert kept_in(settings_of(work, keep_mlp=False, recompute=False, device_memory=device_memory)) is None
    assert kept_in(settings_of(work, keep_mlp=False)) is None
    assert kept_in(settings_of(work, keep_mlp=True)) == NOTHING_TWICE
    assert kept_in(settings_of(work, keep_mlp=True, keep_attention=False, offload_activations=True)) == (
        False,
        True,
        MLP,
    )
    too_much = peaks_by_kept(work)[True, False, MLP] - 1
    # On the host they are kept on demand only.
    assert kept_in(settings_of(work, keep_mlp=True, device_memory=too_much, host_memory=HUGE)) == (True, True, MLP)
    assert kept_in(settings_of(work, offload_activations=True, host_memory=HUGE)) == (True, True)
    # Where nothing fits the larger peak is not taken, of equal ones what computes again.
    assert kept_in(settings_of(work, recompute=False, device_memory=1)) is None
    short = workload(seq_len=512, stage=2)
    assert len(set(peaks_by_kept(short).values())) == 1
    assert kept_in(settings_of(short, recompute=False, device_memory=1)) is None


@pytest.mark.parametrize("keep_mlp", ["auto", True])
def test_experts_keep_nothing(keep_mlp):
    """As groups of heads without sequence parallelism: what the model has not got has no effect."""
    work = workload(EXPERTS)
    assert kept_in(settings_of(work, keep_mlp=keep_mlp, mlp_chunks=8, loss_chunks=8)) is None
    assert kept_in(settings_of(work, keep_mlp=keep_mlp, device_memory=1)) is not None
    of_adapters = replace(workload().shape, trained=replace(workload().shape.trained, mlp=1000))
    assert kept_in(settings_of(replace(workload(), shape=of_adapters), keep_mlp=keep_mlp)) is None


@pytest.mark.parametrize("recompute", [True, "auto"])
def test_what_recompute_keeps_means_recompute(recompute):
    work = workload(seq_len=500_000)
    assert kept_in(settings_of(work, recompute=recompute, keep_attention=True)) == (True, False, MLP)
    assert kept_in(settings_of(work, recompute=recompute, offload_activations=True)) == (True, True)
    # Not to keep attention or not to offload can be had without it.
    expected = NOTHING_TWICE if recompute == "auto" else (False, False, MLP)
    assert kept_in(settings_of(work, recompute=recompute, keep_attention=False, offload_activations=False)) == expected


def test_where_the_states_do_not_fit_there_is_recompute():
    # So short that the optimizer step makes the peak of every setting: adapters, whose states are less, may still fit.
    work = workload(seq_len=512, stage=2)
    lowest = peaks_by_kept(work)
    assert len(set(lowest.values())) == 1
    assert kept_in(settings_of(work, device_memory=lowest[None])) == NOTHING_TWICE
    assert kept_in(settings_of(work, device_memory=lowest[None] - 1)) == (True, False)


def test_where_nothing_fits_the_lowest_peak_is_chosen():
    work = workload(seq_len=500_000)
    lowest = peaks_by_kept(work)
    assert kept_in(settings_of(work, device_memory=1, host_memory=HUGE)) == (False, True)
    assert kept_in(settings_of(work, device_memory=1)) == (False, False)
    assert min(lowest, key=lowest.__getitem__) == (False, True)


def test_where_the_host_alone_lacks_memory_that_is_the_nearest_plan():
    """It fits the device and keeps least on the host."""
    work = workload(seq_len=500_000)
    device_memory = peaks_by_kept(work)[False, False] - 1
    assert kept_in(settings_of(work, device_memory=device_memory, host_memory=GIB, layer_chunks=1)) == (False, True)
    assert kept_in(settings_of(work, device_memory=device_memory, layer_chunks=1)) == (False, False)


@pytest.mark.parametrize(("device_memory", "host_memory"), [(1, None), (1, HUGE), (HUGE, 1), (HUGE, HUGE)])
def test_what_the_user_set_stays(device_memory, host_memory):
    memory = {"device_memory": device_memory, "host_memory": host_memory}
    work = workload(seq_len=500_000, sp_size=2)
    names = ("keep_attention", "offload_activations", "keep_mlp")
    for values in itertools.product((True, False), repeat=3):
        given = dict(zip(names, values, strict=True))
        chosen = settings_of(work, recompute=True, **given, **memory)
        assert chosen.recompute
        assert tuple(getattr(chosen, name) for name in names) == values
    for keep_attention, offload_activations in itertools.product((True, False), repeat=2):
        assert settings_of(work, keep_attention=keep_attention, **memory).keep_attention == keep_attention
        one = settings_of(work, offload_activations=offload_activations, **memory)
        assert one.offload_activations == offload_activations
    assert settings_of(work, head_groups=3, **memory).head_groups == 3
    assert settings_of(work, mlp_chunks=3, **memory).mlp_chunks == 3
    assert settings_of(work, layer_chunks=3, **memory).layer_chunks == 3
    # What the workload has is no wish of theirs.
    choose = partial(settings_of, recompute=True, keep_attention=False, offload_activations=False, **memory)
    assert choose(work.with_settings(layer_chunks=5)) == choose(work)


@pytest.mark.parametrize("keep_mlp", [False, True])
@pytest.mark.parametrize("sp_size", [1, 2])
def test_a_layer_has_several_chunks_where_one_does_not_fit(sp_size, keep_mlp):
    work = workload(seq_len=500_000, sp_size=sp_size)
    mst = {"recompute": True, "keep_attention": False, "offload_activations": False, "keep_mlp": keep_mlp}

    def chosen(**given):
        settings = settings_of(work, **mst, **given)
        return settings, peak(replace(work, settings=settings), settings.mlp_chunks, settings.loss_chunks).device_bytes

    one, needed = chosen(layer_chunks=1, device_memory=1)
    assert chosen(device_memory=needed)[0].layer_chunks == one.layer_chunks == 1
    several, less = chosen(device_memory=needed - 1)
    assert several.layer_chunks == 2
    assert less < needed
    assert chosen(layer_chunks=1000)[0].layer_chunks == 1000


def test_layers_that_cannot_stream_have_one_chunk():
    work = workload(seq_len=500_000)
    choose = partial(settings_of, keep_mlp=False, offload_activations=False, device_memory=1)
    assert choose(work, recompute=True, keep_attention=False).layer_chunks > 1
    assert choose(work, recompute=False).layer_chunks == 1
    other = replace(work, shape=replace(work.shape, has_own_attention=True))
    # Nor is their attention kept. What the user asks for has no effect either, as when the plan is applied.
    for given in ({}, {"layer_chunks": 4, "keep_attention": True}):
        chosen = choose(other, recompute=True, **given)
        assert (chosen.layer_chunks, chosen.keep_attention) == (1, False)


def test_without_recompute_nothing_is_chosen_for_it():
    for device_memory in (1, HUGE):
        chosen = settings_of(workload(), recompute=False, device_memory=device_memory, host_memory=HUGE)
        assert (chosen.recompute, chosen.keep_attention, chosen.offload_activations) == (False, False, False)


def test_groups_of_heads_are_the_fewest_that_fit_or_keep_attention_from_being_the_peak():
    # 32 query and 8 key/value heads on 2 ranks: 4 key/value heads of each.
    work = workload(seq_len=2_000_000, sp_size=2)
    choose = partial(settings_of, work, recompute=True, keep_attention=False, keep_mlp=False)
    roomy = choose().head_groups
    assert roomy > 1
    gathered = [
        total_bytes(attention_step(work.with_settings(head_groups=count), backward=True)) for count in (1, 2, 4)
    ]
    assert gathered == sorted(gathered, reverse=True)
    tight = choose(device_memory=1).head_groups
    assert roomy <= tight <= 4
    assert settings_of(work, head_groups=1).head_groups == 1
    # Nothing is gathered without sequence parallelism, and a rank has no more groups than query heads.
    assert settings_of(workload(), head_groups=4).head_groups == 1
    assert settings_of(work, head_groups=100).head_groups == 16


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_more_groups_of_heads_never_need_more(sp_size, backward):
    """But for the sums of a key's gradients, where several groups have it."""
    work = workload(sp_size=sp_size)
    found = [attention_step(work.with_settings(head_groups=count), backward=backward) for count in range(1, 9)]
    steps = [total_bytes(term for term in terms if term.name != "shared_gradient_sums") for terms in found]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0] > steps[1]) == (sp_size > 1)


@pytest.mark.parametrize(
    ("num_heads", "num_key_value_heads", "sp_size", "expected"),
    [
        (32, 8, 1, [1]),
        (32, 8, 2, [1, 2, 4]),
        (32, 8, 8, [1]),
        (32, 8, 16, [1]),
        (30, 6, 4, [1]),
        (36, 12, 2, [1, 2, 3, 6]),
    ],
)
def test_groups_to_try_exchange_no_key_value_head_twice(num_heads, num_key_value_heads, sp_size, expected):
    model = LlamaConfig(
        hidden_size=num_heads * 8, num_attention_heads=num_heads, num_key_value_heads=num_key_value_heads
    )
    assert workload(model, sp_size=sp_size).heads.group_counts == expected
