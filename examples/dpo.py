"""TRL's DPOTrainer with a plan in the model and in its reference, on made-up answers: `python examples/dpo.py`, or
`torchrun --nproc_per_node 2 examples/dpo.py --sp_size 2`."""

import argparse

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from mst_ds.data import byte_tokenizer
from mst_ds.integrations import MstTrainerMixin


class MstDPOTrainer(MstTrainerMixin, DPOTrainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--sp_size", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--output_dir", default="runs/dpo")
    options = parser.parse_args()

    # A small Llama that reads bytes, twice; from_pretrained(...) in its place for a model that is there.
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.max_length,
    )
    torch.manual_seed(0)
    model, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    sums = [(first, second) for first in range(8) for second in range(8)]
    rows = [{"prompt": f"{a} + {b} = ", "chosen": str(a + b), "rejected": str(a - b)} for a, b in sums]

    trainer = MstDPOTrainer(
        model=model,
        ref_model=reference,  # gets the settings of the model's plan
        args=DPOConfig(
            output_dir=options.output_dir,
            max_length=options.max_length,
            per_device_train_batch_size=4,
            max_steps=options.max_steps,
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),
            bf16=torch.accelerator.is_available(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        mst={"sp_size": options.sp_size, "recompute": True},
    )
    print(trainer.mst_settings)
    trainer.train()


if __name__ == "__main__":
    main()
