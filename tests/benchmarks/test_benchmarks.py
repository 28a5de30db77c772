"""The benchmarks at a tiny size: what they count is known, and contenders that compute something else are refused."""

import json
import math
import sys
from types import ModuleType

import datasets
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama import modeling_llama as llama

from benchmarks import measure as measuring
from benchmarks.contenders import CONTENDERS, Work, missing_package
from benchmarks.flops import attention_forward_flops, count_flops
from benchmarks.measure import Bench, longest, measure
from benchmarks.report import as_record, quartiles, write_json
from benchmarks.sizes import Size
from benchmarks.tokenising import parse_options, resident, speed
from benchmarks.write_report import page, plot
from mst_ds.data import byte_tokenizer

LENGTH, LAYERS = 64, 2
TINY = Size(
    {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    },
    torch.float32,
    (LENGTH,),
)
WORK = Work(LENGTH, mlp_chunks=4, loss_chunks=4)
INSTALLED = [name for name in CONTENDERS if missing_package(name) is None and name != "Liger + recompute"]  # on a CPU
# How often each contender runs a layer's attention forward, and in how many chunks.
ATTENTION_FORWARDS = dict.fromkeys(CONTENDERS, 1) | dict.fromkeys(
    ("recompute", "chunk checkpoint", "DeepSpeed ALST", "mst_ds, attention again", "mst_ds, as StreamBP"), 2
)
LAYER_CHUNKS = dict.fromkeys(CONTENDERS, 1) | {"mst_ds, 4 layer chunks": 4}
LAYER_CHUNKS |= {name: 16 for name in CONTENDERS if "16 layer chunks" in name or "StreamBP" in name}


@pytest.fixture(scope="module")
def bench():
    return Bench(TINY, LENGTH, torch.device("cpu"))


@pytest.mark.parametrize("part", measuring.PARTS)
def test_all_contenders_agree_and_are_measured(bench, part):
    measured = measure(bench, INSTALLED, WORK, part, rounds=1)
    results = measured.results
    attention_product = LAYERS * 4 * LENGTH**2 * 8  # causal, of all heads: half of 2 FLOPs an element
    assert [result.contender for result in results] == INSTALLED
    assert (measured.reference, measured.out_of_memory) == ("recompute", [])
    for result in results:
        assert result.peak_bytes > 0
        assert len(result.seconds) == 1
        forwards, chunks = ATTENTION_FORWARDS[result.contender], LAYER_CHUNKS[result.contender]
        # A chunk has a call for itself, and one for all before it, in the backward for each.
        assert result.counts.attention_backwards == LAYERS * chunks * (chunks + 1) // 2, result.contender
        if forwards == 1:
            assert result.counts.attention_forwards == LAYERS * (2 * chunks - 1), result.contender
        assert result.counts.attention == (2 * forwards + 5) * attention_product, result.contender
        assert all("attention" in name for name in result.counts.attention_kernels)
        assert len(result.counts.attention_kernels) == 2
    counts = {result.contender: result.counts for result in results}
    # The MLP's products: 3 of the forward, 6 of the backward, and of those of the forward that are computed again. A
    # layer's first backward, which is counted here, finds out that nobody reads the MLP's output: it has all 3, and of
    # the MLP's own backward gate and up once more.
    token, weights = 2 * LENGTH, LAYERS * 32 * 48
    mlps = {"no recompute": 9, "recompute": 12, "chunk checkpoint": 15, "DeepSpeed ALST": 15, "mst_ds": 14}
    projections = token * LAYERS * (2 * 32 * 32 + 2 * 32 * 16)  # of attention, computed again
    for name, products in mlps.items():
        extra = counts[name].matrix - counts["no recompute"].matrix - token * weights * (products - 9)
        head = token * 32 * 97 if part == "step" else 0
        assert 0 <= extra <= projections + head, name
    # On so large a device nothing is computed twice.
    assert counts["mst_ds, planned"].matrix == counts["no recompute"].matrix
    assert counts["mst_ds, no recompute"].matrix == counts["no recompute"].matrix + 2 * token * weights


def test_other_gradients_are_refused(bench, monkeypatch):
    def off(name, model, work):
        contender = CONTENDERS["recompute"](name, model, work)
        model.model.norm.variance_epsilon = 0.1
        return contender

    monkeypatch.setitem(CONTENDERS, "off", off)
    with pytest.raises(ValueError, match=r"off: the gradient of .* is off by"):
        measure(bench, ["off"], WORK, "step", rounds=1)


@pytest.fixture
def too_large(monkeypatch):
    """Names a contender that needs more memory than there is."""

    def name_contender(name):
        def run_out(*_, **__):
            raise torch.OutOfMemoryError

        def build(name, model, work):
            model.forward = run_out
            return CONTENDERS["no recompute"](name, model, work)

        monkeypatch.setitem(CONTENDERS, name, build)

    return name_contender


def test_a_contender_that_runs_out_of_memory_does_not_stop_the_others(bench, too_large):
    too_large("too large")
    measured = measure(bench, ["too large", "mst_ds"], WORK, "step", rounds=2)
    assert [result.contender for result in measured.results] == ["mst_ds"]
    assert len(measured.results[0].seconds) == 2
    assert (measured.reference, measured.out_of_memory) == ("recompute", ["too large"])


def test_another_is_the_reference_where_recompute_runs_out_of_memory(bench, too_large):
    too_large("recompute")
    measured = measure(bench, ["recompute", "mst_ds, one chunk", "mst_ds"], WORK, "step", rounds=1)
    assert (measured.reference, measured.out_of_memory) == ("mst_ds, one chunk", ["recompute"])
    assert [result.contender for result in measured.results] == ["mst_ds, one chunk", "mst_ds"]
    nothing = measure(bench, ["recompute"], WORK, "step", rounds=1)
    assert (nothing.results, nothing.reference, nothing.out_of_memory) == ([], None, ["recompute"])


def test_liger_replaces_nothing_in_other_models(bench, monkeypatch):
    """By a stand-in that does what liger-kernel does: classes for all models, forwards of one."""
    rotated = []

    def rotate(*args, **kwargs):
        rotated.append(True)
        return own_rotary(*args, **kwargs)

    def apply_to_llama(rope, model):
        assert not rope  # it would be for all models
        llama.LlamaRMSNorm = llama.LlamaMLP = None

    package = ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = apply_to_llama
    rope = ModuleType("liger_kernel.transformers.rope")
    rope.liger_rotary_pos_emb = rotate
    for module in (ModuleType("liger_kernel"), package, rope):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    own_rotary, classes = llama.apply_rotary_pos_emb, (llama.LlamaRMSNorm, llama.LlamaMLP)
    measured = measure(bench, ["Liger + recompute", "mst_ds, one chunk"], WORK, "step", rounds=1)
    assert [result.contender for result in measured.results] == ["Liger + recompute", "mst_ds, one chunk"]
    assert (llama.LlamaRMSNorm, llama.LlamaMLP) == classes
    assert llama.apply_rotary_pos_emb is own_rotary
    # A warm-up and a round, each with a forward that is computed again.
    assert len(rotated) == 2 * 2 * LAYERS


def test_the_same_weights_at_another_length(bench):
    longer = bench.at(2 * LENGTH)
    assert longer.model is bench.model
    assert (bench.input_ids.shape[1], longer.input_ids.shape[1]) == (LENGTH, 2 * LENGTH)
    usage = longer.fits("mst_ds", WORK, "step", memory=2**30)
    assert usage is not None
    assert longer.fits("mst_ds", WORK, "step", memory=usage.peak_bytes - 1) is None


def test_flops_of_products_and_of_causal_attention():
    a, b = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5)
    assert count_flops(lambda: (a @ b).sum().backward()).matrix == 2 * 3 * 4 * 5 * 2
    assert count_flops(lambda: torch.ones(3, 5).addmm_(a.detach(), b)).matrix == 2 * 3 * 4 * 5
    query, key = torch.ones(1, 4, 16, 8, requires_grad=True), torch.ones(1, 2, 16, 8)

    def attend():
        scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).sum().backward()

    counts = count_flops(attend)
    forward = 2 * 2 * 4 * 16 * 16 * 8 // 2
    assert counts.attention == forward * 7 // 2
    assert (counts.attention_forwards, counts.attention_backwards) == (1, 1)


def test_flops_of_documents_one_after_another():
    """As kernels for packed documents get them, (T, n, D): each document is a triangle of its own."""
    query, value = torch.ones(12, 4, 8), torch.ones(12, 2, 8)
    arguments = {"query": query, "key": value, "value": value, "cum_seq_q": torch.tensor([0, 4, 12]), "is_causal": True}
    flops = attention_forward_flops("aten::_flash_attention_forward", arguments)
    assert flops == 2 * 2 * 4 * (4**2 + 8**2) * 8 // 2


@pytest.mark.parametrize("limit", [0, 99, 100, 850, 12345])
def test_the_longest_that_fits(limit):
    assert longest(lambda length: length <= limit, shortest=100, step=50) == limit // 50 * 50


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_tokenising_is_measured_by_both_ways_and_becomes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "abcdef"}\n' * 2)
    options = parse_options(["--tokenizer", str(tmp_path), "--rounds", "2", "--of_file", str(tmp_path / "a.jsonl")])
    found = {"speed": speed(["ab", "", "é"], options), "memory": resident(options)}
    assert [len(found["speed"][name]) for name in ("seconds", "seconds_alone")] == [2, 2]
    assert (found["speed"]["num_bytes"], found["speed"]["num_tokens"]) == (4, 4 + 2)  # with EOS of the two
    assert (found["memory"]["num_documents"], found["memory"]["fewest_tokens"]) == (2, 7)
    assert found["memory"]["peak_bytes"] >= found["memory"]["bytes_before"] > 2**26
    write_json(tmp_path / "tiny.json", torch.device("cpu"), {}, {"tokenising": found})
    text = page({"tiny": json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))})
    assert "- 2 documents of 7 tokens or more: " in text


def test_results_become_a_page_and_a_plot(bench, tmp_path):
    measured = measure(bench, ["recompute", "mst_ds"], WORK, "step", rounds=2)
    records = [as_record(measured, part="step", seq_len=LENGTH, chunks=4)]
    write_json(tmp_path / "tiny.json", torch.device("cpu"), {"rounds": 2, "none": math.nan}, {"records": records})
    document = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert document["settings"] == {"rounds": 2, "none": None}
    text = page({"tiny": document})
    assert "| mst_ds |" in text
    assert document["where"]["commit"][:12] in text
    plot(document["records"], tmp_path / "tiny.svg")
    assert (tmp_path / "tiny.svg").stat().st_size > 1000
