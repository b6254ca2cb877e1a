"""A small GPT-2 with Hugging Face's Trainer, on token sequences of uneven lengths, which are padded.

python with_trainer.py                            one process
torchrun --nproc-per-node=2 with_trainer.py       two, with the same global batch
"""

import os
import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import lockstep.verify

GLOBAL_BATCH, LONGEST, WORDS = 8, 24, 50


def make_sequences(number: int) -> list[dict[str, list[int]]]:
    """Sequences in which each token is the sum of the two before it, modulo WORDS."""
    found = []
    for index in range(number):
        tokens = [index % WORDS, (index * 7 + 1) % WORDS]
        while len(tokens) < 4 + index * 5 % (LONGEST - 3):
            tokens.append((tokens[-1] + tokens[-2]) % WORDS)
        found.append({"input_ids": tokens})
    return found


def pad(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    def filled(value: int) -> torch.Tensor:
        return torch.tensor([each["input_ids"] + [value] * (LONGEST - len(each["input_ids"])) for each in samples])

    labels = filled(-100)  # what the loss leaves out
    return {"input_ids": filled(0), "labels": labels, "attention_mask": (labels != -100).long()}


set_seed(0)
# Without dropout, which would draw other numbers on each rank.
config = GPT2Config(
    vocab_size=WORDS, n_positions=LONGEST, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
model = GPT2LMHeadModel(config)
lockstep.verify.watch(model)  # the Trainer makes the optimizer later
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=20,
        learning_rate=0.002,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        disable_tqdm=True,
    )
    data: Any = make_sequences(64)
    Trainer(model, arguments, data_collator=pad, train_dataset=data).train()
