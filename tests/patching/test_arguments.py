"""What a patched model makes of the arguments that collators and trainers pass beside the tokens."""

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model
from transformers import DataCollatorWithFlattening

from mst_ds import apply_settings
from mst_ds.data import shard
from mst_ds.sequence_parallel import run_simulated
from mst_ds.topology import Topology

LENGTHS = (7, 4, 9)


def flattened():
    features = [{"input_ids": make_batch()["input_ids"][0, :length].tolist()} for length in LENGTHS]
    return dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features))


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


LENGTHS_OF = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@pytest.mark.parametrize(
    "left_out", [(), ("position_ids",), ("position_ids", "seq_idx"), ("position_ids", *LENGTHS_OF)]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_documents_may_be_told_in_other_ways_than_by_positions(name, left_out):
    batch = flattened()
    positions_alone = without(batch, "seq_idx", *LENGTHS_OF)
    expected = loss_and_gradients(apply_settings(tiny_model(name), tiny_settings()), **positions_alone)
    assert_close(
        loss_and_gradients(apply_settings(tiny_model(name), tiny_settings()), **without(batch, *left_out)), expected, 0
    )


def test_rows_of_several_documents():
    ids = make_batch(20)["input_ids"]
    positions = torch.tensor([[*range(12), *range(8)], [*range(5), *range(15)]])
    borders = torch.tensor([0, 12, 20, 25, 40])
    model = apply_settings(tiny_model("llama"), tiny_settings())
    expected = model(ids, position_ids=positions).logits
    assert torch.equal(model(ids, cu_seq_lens_q=borders, max_length_q=15).logits, expected)
    assert torch.equal(model(ids, seq_idx=(positions == 0).cumsum(1)).logits, expected)
    # A length beyond the longest document is what static shapes have.
    assert torch.equal(model(ids, position_ids=positions, cu_seq_lens_q=borders, max_length_q=40).logits, expected)


CONTRADICTIONS = {
    "positions": (
        {"cu_seq_lens_q": torch.tensor([0, 8, 11, 20])},
        ("seq_idx", "cu_seq_lens_k"),
        "token 7 by position_ids",
    ),
    "each-other": ({"cu_seq_lens_k": torch.tensor([0, 8, 11, 20])}, (), "cu_seq_lens_q and cu_seq_lens_k differ"),
    "index": ({"seq_idx": torch.zeros(1, 20)}, LENGTHS_OF, "seq_idx and position_ids differ: in row 0 .* at token 7"),
    "index-shape": ({"seq_idx": torch.zeros(1, 19)}, (), r"seq_idx must be \(batch, length\)"),
    "longest": ({"max_length_q": 8}, (), "max_length_q is 8, but a document of cu_seq_lens_q has 9 tokens"),
    "end": ({"cu_seq_lens_q": torch.tensor([0, 7, 11])}, (), "must rise from 0 to the number of tokens, 20; got"),
    "order": ({"cu_seq_lens_q": torch.tensor([0, 11, 7, 20])}, (), "must rise from 0 to the number of tokens"),
}


@pytest.mark.parametrize(("given", "left_out", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused(given, left_out, message):
    model = apply_settings(tiny_model("llama"), tiny_settings())
    with pytest.raises(ValueError, match=message):
        model(**{**without(flattened(), *left_out), **given})


def test_documents_across_rows_and_on_shards_are_refused():
    ids = make_batch(20)["input_ids"]
    model = apply_settings(tiny_model("llama"), tiny_settings())
    with pytest.raises(ValueError, match=r"a document that goes on from one row into the next"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 25, 40]))
    # Nothing communicates before the arguments are checked, so any object will do for the group.
    sharded = apply_settings(tiny_model("llama"), tiny_settings(2), sequence_group=object())
    with pytest.raises(
        ValueError, match=r"with sp_size > 1 documents are told apart by position_ids alone: .* seq_idx"
    ):
        sharded.model(ids, seq_idx=torch.zeros(2, 20))


def test_a_model_with_its_own_attention_takes_one_document_a_row():
    model = apply_settings(tiny_model("falcon-alibi"), tiny_settings())
    with pytest.raises(ValueError, match=r"pass one document a row \(--packing none\)"):
        model(**without(flattened(), "position_ids"))


@pytest.mark.parametrize("inner", [False, True], ids=["model", "decoder"])
def test_unknown_arguments_are_refused(inner):
    model, ids = apply_settings(tiny_model("llama"), tiny_settings()), make_batch()["input_ids"]
    called = model.model if inner else model
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no argument 'fused_lm_head', which would be ignored"):
        called(ids, fused_lm_head=True)
    with pytest.raises(ValueError, match=r"no argument 'positions_ids', .* nearest: 'position_ids'"):
        called(ids, positions_ids=ids)
    called(ids, fused_lm_head=None)


def test_weights_of_attention_are_refused():
    model, ids = apply_settings(tiny_model("llama"), tiny_settings()), make_batch()["input_ids"]
    with pytest.raises(ValueError, match=r"output_attentions: attention with a plan has no matrix of weights"):
        model(ids, output_attentions=True)


def test_a_part_of_a_batch_with_a_part_of_its_table_is_refused():
    # Of two rows with two documents each; the first row's table would say one document too few.
    ids = torch.randint(2, 90, (2, 16))
    positions = torch.cat([torch.arange(8), torch.arange(8)]).expand(2, -1)
    batch = shard({"input_ids": ids, "labels": ids, "position_ids": positions}, Topology(0, 1, 1))
    model = apply_settings(tiny_model("llama"), tiny_settings())
    model(**batch)
    for rows in (1, 2):
        part = {name: tensor[:1] for name, tensor in batch.items()} | {"document_table": batch["document_table"][:rows]}
        with pytest.raises(ValueError, match="document_table is not that of 1 x 16 tokens: pass that of the whole"):
            model(**part)


@pytest.mark.parametrize(("sp_size", "layer_chunks"), [(2, 1), (2, 3), (1, 2)])
def test_shards_for_another_plan_are_refused(sp_size, layer_chunks):
    ids = torch.randint(2, 90, (1, 32))
    batch = {"input_ids": ids, "labels": ids}
    plan = tiny_settings(2, layer_chunks=2)

    def run(group):
        own = apply_settings(tiny_model("llama"), plan, sequence_group=group)
        topology = Topology(group.rank, 2, 2)
        assert own(**shard(batch, topology, layer_chunks=2), num_items_in_batch=31).loss.isfinite()
        other = shard(batch, Topology(group.rank % sp_size, 2, sp_size), layer_chunks=layer_chunks)
        says = (
            f"^document_table is of shards for sp_size {sp_size} and layer_chunks {layer_chunks}, but the plan has "
            r"sp_size 2 and layer_chunks 2: make them by mst_ds.data.shard\(batch, plan.topology, layer_chunks=plan\."
        )
        with pytest.raises(ValueError, match=says):
            own(**other, num_items_in_batch=31)

    run_simulated(run, 2)


@pytest.mark.parametrize("has_positions", [False, True])
def test_shards_that_do_not_say_how_they_were_made_are_refused_with_several_chunks(has_positions):
    """Consecutive tokens, as a caller's own code makes them, would be taken for others."""
    ids = torch.randint(2, 90, (1, 32))

    def run(group):
        batch = {"input_ids": ids, "shift_labels": ids, "position_ids": torch.arange(32)[None]}
        own = {name: each.chunk(2, dim=1)[group.rank] for name, each in batch.items()}
        if not has_positions:
            del own["position_ids"]
        several = apply_settings(tiny_model("llama"), tiny_settings(2, layer_chunks=2), sequence_group=group)
        says = r"^with sp_size 2 and layer_chunks 2 .* no document_table.*: make it by mst_ds\.data\.shard\(.*, or set "
        with pytest.raises(ValueError, match=says):
            several(**own, num_items_in_batch=31)
        one = apply_settings(tiny_model("llama"), tiny_settings(2), sequence_group=group)
        assert one(**own, num_items_in_batch=31).loss.isfinite()

    run_simulated(run, 2)


def test_a_sequence_on_one_rank_has_one_layout():
    ids = torch.randint(2, 90, (1, 32))
    batch = shard({"input_ids": ids, "labels": ids}, Topology(0, 1, 1), layer_chunks=3)
    apply_settings(tiny_model("llama"), tiny_settings(layer_chunks=2))(**batch)
