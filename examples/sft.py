"""TRL's SFTTrainer with a plan, on made-up prompts and answers: `python examples/sft.py`, or with several processes
`torchrun --nproc_per_node 2 examples/sft.py --sp_size 2`."""

import argparse

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from mst_ds.data import byte_tokenizer
from mst_ds.integrations import MstTrainerMixin


class MstSFTTrainer(MstTrainerMixin, SFTTrainer):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--sp_size", type=int, default=1, help="processes that share a sequence")
    parser.add_argument("--max_steps", type=int, default=5)
    parser.add_argument("--output_dir", default="runs/sft")
    options = parser.parse_args()

    # A small Llama that reads bytes; from_pretrained(...) in its place for a model that is there.
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
    model = LlamaForCausalLM(config)
    sums = [(first, second) for first in range(16) for second in range(16)]
    dataset = Dataset.from_list([{"prompt": f"{a} + {b} = ", "completion": str(a + b)} for a, b in sums])

    trainer = MstSFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output_dir,
            max_length=options.max_length,
            packing=True,  # several samples a row, of which none sees another
            per_device_train_batch_size=1,
            max_steps=options.max_steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),
            bf16=torch.accelerator.is_available(),
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        # The longest sequence is max_length; what is not said is chosen.
        mst={"sp_size": options.sp_size, "recompute": True},
    )
    print(trainer.mst_settings)
    trainer.train()


if __name__ == "__main__":
    main()
