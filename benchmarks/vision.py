"""Vision Mamba, tiny, beside timm's DeiT-tiny with flash attention: speed and memory by image size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Check, Options, Report, case, relative_error
from benchmarks.timing import Candidate, measure

OURS, DEIT = "vim_tiny", "timm deit_tiny, flash attention"
INFERENCE, TRAINING = "inference", "forward + backward"
# Logits of 24 layers in bf16 autocast, beside the same weights in fp64.
LOGITS = 5e-2


def _model(name: str, size: int, options: Options) -> nn.Module:
    timm_create = peers.peer("timm", "create_model")
    import ssm_modal.models.vision_mamba  # noqa: F401  registers vim_* with timm

    torch.manual_seed(0)
    small: dict[str, Any] = {"depth": 2, "embed_dim": 48} if options.tiny else {}
    with torch.device(options.device):
        return timm_create(name, img_size=size, num_classes=1000, **small)


def _way(name: str, model: nn.Module, x: Tensor, labels: Tensor, training: bool, right: Tensor) -> Candidate:
    """One batch in bf16 autocast: logits, or the loss and the gradients of every weight."""
    weights = list(model.parameters())
    ours = name == OURS

    def logits(x: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        flash = not ours and x.device.type == "cuda"
        with (
            sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext(),
            torch.autocast(x.device.type, torch.bfloat16),
        ):
            return model(x)

    def run() -> object:
        model.train(training)
        if not training:
            with torch.no_grad():
                return logits(x)
        loss = F.cross_entropy(logits(x).float(), labels)
        return loss.detach(), *torch.autograd.grad(loss, weights)

    def verify(result: object) -> list[Check]:
        model.eval()
        with torch.no_grad():
            return [Check("logits", relative_error(logits(x[:1]), right), LOGITS)]

    return Candidate(name, run, verify if ours else None, lambda: (*weights, x))


def _vision(name: str, options: Options, size: int, batch: int, train_batch: int) -> Report:
    options.need()
    if options.tiny:
        size, batch, train_batch = 32, 2, 2
    ours = _model("vim_tiny_patch16_224", size, options).eval()
    make = torch.Generator(options.device).manual_seed(0)
    x = torch.randn(max(batch, train_batch), 3, size, size, generator=make, device=options.device)
    labels = torch.randint(1000, (x.shape[0],), generator=make, device=options.device)
    with torch.no_grad():
        right = copy.deepcopy(ours).double()(x[:1].double())
    report = Report(
        name, f"{size} x {size} pixels, B{batch} (training B{train_batch}), bf16 autocast", OURS, length=size
    )
    report.rates = {INFERENCE: (batch, "images"), TRAINING: (train_batch, "images")}

    def ways(notes: list[str], training: bool) -> Iterator[Candidate]:
        here = train_batch if training else batch
        given = x[:here], labels[:here], training, right
        yield _way(OURS, ours, *given)
        yield from peers.offer(
            notes, DEIT, lambda: _way(DEIT, _model("deit_tiny_patch16_224", size, options), *given)
        )

    for what in (INFERENCE, TRAINING):
        training = what == TRAINING
        notes = [] if training else report.notes
        measure(report, what, ways(notes, training), options, options.device, memory=True)
    return report


@case(seconds=15.0, whole=False)
def vision_224(options: Options) -> Report:
    """Vision Mamba tiny beside DeiT-tiny at 224 x 224 pixels, 197 tokens: inference and training."""
    return _vision("vision_224", options, 224, 128, 128)


@case(seconds=15.0, whole=False)
def vision_512(options: Options) -> Report:
    """Vision Mamba tiny beside DeiT-tiny at 512 x 512 pixels, 1,025 tokens."""
    return _vision("vision_512", options, 512, 32, 32)


@case(seconds=20.0, whole=False)
def vision_1248(options: Options) -> Report:
    """Vision Mamba tiny beside DeiT-tiny at 1248 x 1248 pixels, 6,085 tokens."""
    return _vision("vision_1248", options, 1248, 8, 8)
