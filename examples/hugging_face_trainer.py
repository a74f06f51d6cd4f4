"""A Hugging Face `Trainer` (transformers with accelerate) around a model of this package: bytes of a text.

pip install transformers accelerate
python examples/hugging_face_trainer.py --text book.txt --steps 200 --out byte_model
"""

import argparse
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import ssm_modal


class ForTrainer(torch.nn.Module):
    """What a `Trainer` asks of a model: named inputs, and a dict with the loss.

    logits[:, t] predict what follows ids[:, t], so the labels are the ids one step on.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits, _ = self.model(input_ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return {"loss": loss, "logits": logits}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--text", default=__file__, help="the file whose bytes are learned (default: this one)")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--d-model", type=int, default=64)
parser.add_argument("--out", default="byte_model", help="the folder that gets the trained model")
options = parser.parse_args()

torch.manual_seed(0)
data = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8).long()
starts = range(0, len(data) - options.length, options.length // 2)
windows = [
    {"input_ids": data[i : i + options.length], "labels": data[i + 1 : i + options.length + 1]}
    for i in starts
]
model = ForTrainer(ssm_modal.create_model("mamba_lm", vocab_size=256, d_model=options.d_model, n_layers=2))
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=f"{options.out}/trainer",
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        seed=0,
    ),
    train_dataset=windows,
)
result = trainer.train()
# The model alone, without the wrapper: load_pretrained, ssm-modal generate and ssm-modal explain take it.
model.model.save_pretrained(options.out)
print(f"loss {result.training_loss:.3f} nats a byte over {options.steps} steps")
