"""transformers' Trainer with a plan, on made-up tokens: `python examples/trainer.py`, or with several processes
`torchrun --nproc_per_node 2 examples/trainer.py --sp_size 2`."""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mst_ds.integrations import MstTrainerMixin


class MstTrainer(MstTrainerMixin, Trainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--sp_size", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--deepspeed", help="a DeepSpeed JSON; its 'mst' block takes the place of the settings here")
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/trainer")
    options = parser.parse_args()

    # A small Llama; from_pretrained(...) in its place for a model that is there.
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.seq_len,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokens = torch.randint(1000, (16, options.seq_len))
    rows = [{"input_ids": row, "labels": row} for row in tokens]

    arguments = TrainingArguments(
        output_dir=options.output_dir,
        deepspeed=options.deepspeed,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=options.max_steps,
        learning_rate=1e-3,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = MstTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        # What the "mst" block of a DeepSpeed JSON says; what is not said is chosen.
        mst=None if options.deepspeed else {"sp_size": options.sp_size, "recompute": True},
        seq_len=options.seq_len,
    )
    print(trainer.mst_settings)
    trainer.train()


if __name__ == "__main__":
    main()
