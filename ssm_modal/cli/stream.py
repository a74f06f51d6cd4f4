"""`ssm-modal stream`: classify an audio file chunk by chunk, as if it were just being heard."""

from __future__ import annotations

import argparse
import math
import time

import torch

from ssm_modal.checkpoints import load_pretrained
from ssm_modal.checkpoints.locate import stored_data
from ssm_modal.generation import StreamingClassifier
from ssm_modal.io.audio import check_audio, read_audio
from ssm_modal.io.text import expand_path
from ssm_modal.layers.inputs import IdsConfig
from ssm_modal.models import SequenceClassifier
from ssm_modal.tokenizers.waveform import MuLawTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("file", metavar="FILE", help="the recording: WAV, FLAC, OGG or MP3")
    add(
        "--model",
        required=True,
        metavar="PATH",
        help="a causal classifier: a run's folder, a .ckpt file or a saved model's folder",
    )
    add("--chunk-ms", type=float, default=100.0, metavar="MS", help="length of a chunk (%(default)s ms)")
    add(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help="the model's; needed for a saved model's folder, a run knows its own",
    )
    add("--resample", action="store_true", help="resample a file of another rate instead of refusing it")
    add("--mono", action="store_true", help="average the channels instead of refusing more than one")
    add("--device", default="cpu", help='"cpu", "cuda", "cuda:1", ... (%(default)s)')
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of the model (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns 0, or raises the error that says what is wrong with them."""
    if not args.chunk_ms > 0:
        raise ValueError(f"--chunk-ms is {args.chunk_ms}, expected more than 0")
    if args.threads < 1:
        raise ValueError(f"--threads is {args.threads}, expected 1 or more")
    place = str(expand_path(args.model, "--model"))
    model = load_pretrained(place, device=args.device)
    if not isinstance(model, SequenceClassifier):
        raise ValueError(f"--model is a {type(model).__name__}, expected a SequenceClassifier")
    stream = StreamingClassifier(model)
    known = stored_data(place)
    rate = _rate(args.sample_rate, known.get("sample_rate"), place)
    classes = known.get("classes") or [str(i) for i in range(model.config.n_classes)]
    encode = MuLawTokenizer().encode if isinstance(model.config.input, IdsConfig) else None
    file = expand_path(args.file, "FILE")
    about = check_audio(file, sample_rate=rate, resample=args.resample, mono=args.mono, decode=False)
    total = about.frames_at(rate)
    size = max(1, round(args.chunk_ms * rate / 1000))
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        _warm(stream, size, encode is not None)
        latencies = []
        print(f"{'s':>8}  {'class':<12}  {'probability':>11}  {'latency ms':>10}")
        for start in range(0, total, size):
            count = min(size, total - start)
            wave = read_audio(
                file, start, count, sample_rate=rate, resample=args.resample, mono=args.mono
            ).to(args.device)
            chunk = (wave if encode is None else encode(wave))[None]
            began = time.perf_counter()
            probabilities = stream.feed(chunk)[0].cpu()
            latencies.append(time.perf_counter() - began)
            best = int(probabilities.argmax())
            print(
                f"{(start + count) / rate:8.3f}  {classes[best]:<12}  {float(probabilities[best]):11.4f}  "
                f"{1000 * latencies[-1]:10.2f}",
                flush=True,
            )
    finally:
        torch.set_num_threads(threads)
    print(
        f"{len(latencies)} chunks of {1000 * size / rate:g} ms: latency median "
        f"{1000 * quantile(latencies, 0.5):.2f} ms, 99 % below {1000 * quantile(latencies, 0.99):.2f} ms, "
        f"real-time factor {sum(latencies) * rate / total:.4f} on {args.device}"
    )
    return 0


def quantile(values: list[float], q: float) -> float:
    """The smallest of `values` that a share `q` of them does not exceed."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def _rate(given: int | None, trained: int | None, place: str) -> int:
    if given is not None and given < 1:
        raise ValueError(f"--sample-rate is {given}, expected 1 or more")
    if given is not None and trained is not None and given != trained:
        raise ValueError(f"--sample-rate is {given}, but {place} was trained at {trained}")
    rate = given if given is not None else trained
    if rate is None:
        raise ValueError(f"{place} does not say the sample rate it was trained at; give it by --sample-rate")
    return rate


def _warm(stream: StreamingClassifier, size: int, ids: bool) -> None:
    """Run two chunks of `size` and forget them: the first call of a process loads kernels."""
    device = next(stream.model.parameters()).device
    for _ in range(2):
        stream.feed(torch.zeros(1, size, dtype=torch.int64 if ids else torch.float32, device=device))
    stream.reset()
