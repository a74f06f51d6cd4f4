"""A plain PyTorch loop: train a classifier of ids, save it, load it, and ask what it looked at.

    python examples/plain_pytorch.py --steps 100 --out seven_classifier

Sequences are of 32 symbols from 0 to 7; the class is whether one of them is a 7.
"""

import argparse

import torch

import ssm_modal


def sequences(n: int, length: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = torch.randint(7, (n, length)), torch.randint(2, (n,))
    rows = labels.nonzero()[:, 0]
    ids[rows, torch.randint(length, rows.shape)] = 7
    return ids, labels


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--out", default="seven_classifier", help="the folder that gets the trained model")
options = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = ssm_modal.create_model("ids_classifier", vocab_size=8, n_classes=2, d_model=32, n_layers=2).to(device)
# A_log, D and dt_bias ask for no weight decay; everything else is AdamW's as usual.
decayed = [p for p in model.parameters() if not getattr(p, "_no_weight_decay", False)]
others = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False)]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=3e-3
)
for _ in range(options.steps):
    ids, labels = (t.to(device) for t in sequences(64))
    logits, _ = model(ids)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.save_pretrained(options.out)
model = ssm_modal.load_pretrained(options.out)  # in eval mode
ids, labels = sequences(256)
with_a_seven = ids[labels == 1][:1]
with torch.no_grad():
    accuracy = (model(ids)[0].argmax(1) == labels).float().mean()
strongest = ssm_modal.attribute(model, with_a_seven).relevance.abs().argmax().item()
print(f"accuracy {accuracy.item():.3f}")
print(f"strongest at position {strongest}, which holds {with_a_seven[0, strongest].item()}")
