"""The benchmarks at a tiny size: what they count is known, and contenders that compute something else are refused."""

import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import measure as measuring
from benchmarks.contenders import CONTENDERS, Work
from benchmarks.flops import count_flops
from benchmarks.measure import Bench, longest, measure
from benchmarks.report import as_record, quartiles, write_json
from benchmarks.sizes import Size
from benchmarks.write_report import page, plot

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
# Of all attention layers: how often each contender runs the forward of attention.
ATTENTION_FORWARDS = dict.fromkeys(CONTENDERS, LAYERS) | dict.fromkeys(
    ("recompute", "chunk checkpoint", "DeepSpeed ALST", "mst_ds, attention again"), 2 * LAYERS
)


@pytest.fixture(scope="module")
def bench():
    return Bench(TINY, LENGTH, torch.device("cpu"))


@pytest.mark.parametrize("part", measuring.PARTS)
def test_all_contenders_agree_and_are_measured(bench, part):
    results = measure(bench, list(CONTENDERS), WORK, part, rounds=1)
    assert [result.contender for result in results] == list(CONTENDERS)
    for result in results:
        assert result.peak_bytes > 0
        assert len(result.seconds) == 1
        assert result.counts.attention_forwards == ATTENTION_FORWARDS[result.contender], result.contender
        assert result.counts.attention_backwards == LAYERS
    counts = {result.contender: result.counts for result in results}
    # The MLP's products: 3 of the forward, 6 of the backward, and of those of the forward that are computed again.
    token, weights = 2 * LENGTH, LAYERS * 32 * 48
    mlps = {"no recompute": 9, "recompute": 12, "chunk checkpoint": 15, "DeepSpeed ALST": 15, "mst_ds": 11}
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


@pytest.mark.parametrize("limit", [0, 99, 100, 850, 12345])
def test_the_longest_that_fits(limit):
    assert longest(lambda length: length <= limit, shortest=100, step=50) == limit // 50 * 50


def test_quartiles():
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_results_become_a_page_and_a_plot(bench, tmp_path):
    results = measure(bench, ["recompute", "mst_ds"], WORK, "step", rounds=2)
    records = [as_record(results, part="step", seq_len=LENGTH, chunks=4, out_of_memory=[])]
    write_json(tmp_path / "tiny.json", torch.device("cpu"), {"rounds": 2}, {"records": records})
    document = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    text = page({"tiny": document})
    assert "| mst_ds |" in text
    assert document["where"]["commit"][:12] in text
    plot(document["records"], tmp_path / "tiny.svg")
    assert (tmp_path / "tiny.svg").stat().st_size > 1000
