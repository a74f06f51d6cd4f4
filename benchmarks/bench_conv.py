"""Launches of the Triton causal convolution on one NVIDIA GPU: the shipped one, and others beside it.

    python -m benchmarks.bench_conv
    python -m benchmarks.bench_conv --sweep steps=128,256,512
    python -m benchmarks.bench_conv --forward --sweep unroll=4,16

The kernels alone at B8 D2048 L8192, width 4, SiLU, bf16, timed as by `python -m benchmarks.bench_scan`:
forward and backward with other launches of the backward, or the forward alone with others of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_scan import SHIPPED, add_sweep_options, parse_sweep, sweep_options, variants
from benchmarks.harness import Options, Report, Unavailable
from benchmarks.inputs import short
from benchmarks.ops import conv_reference
from benchmarks.output import report_lines
from benchmarks.scan import FORWARD, TRAINING
from benchmarks.timing import Candidate, measure
from ssm_modal.kernels.conv.launch import ConvLaunch, conv_launch

SHAPE = (8, 2048, 8192)  # batch, d_inner, length


def compare(words: Sequence[str] | None, options: Options, only_forward: bool = False) -> Report:
    """The shipped launch, and with `words` others, of the backward or of the forward."""
    from ssm_modal.kernels.conv.triton_bwd import causal_conv1d_bwd
    from ssm_modal.kernels.conv.triton_fwd import causal_conv1d_fwd

    batch, d_inner, length = options.shrink(*SHAPE)
    make = torch.Generator(options.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=options.device, dtype=torch.bfloat16)

    x, weight, bias = normal(batch, length, d_inner), normal(d_inner, 4), normal(d_inner)
    dout = normal(batch, length, d_inner)
    shipped = conv_launch(batch * length, d_inner, 4, not only_forward)
    launches = {SHIPPED: shipped}
    if words is not None:
        launches |= dict(variants(shipped, parse_sweep(words, shipped)))

    def run(launch: ConvLaunch) -> tuple[Tensor | None, ...]:
        given = (x, weight, bias, True, None, None, False)
        out, _ = causal_conv1d_fwd(*given, launch if only_forward else None)
        if only_forward:
            return (out,)
        return out, *causal_conv1d_bwd(dout, None, *given, launch)[:3]

    report = Report("bench_conv", f"B{batch} D{d_inner} L{length} width 4 {short(x.dtype)}", SHIPPED)
    report.notes.append(f"shipped: {shipped}")
    verify = conv_reference(x, weight, bias, dout)
    ways = [Candidate(name, partial(run, launch), verify) for name, launch in launches.items()]
    measure(report, FORWARD if only_forward else TRAINING, ways, options, options.device)
    return report


def main(argv: list[str] | None = None) -> int:
    """Check, then time; exit status 1 where a check of the shipped launch fails or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_conv", description=main.__doc__)
    parser.add_argument("--forward", action="store_true", help="the forward alone")
    add_sweep_options(parser, repeats=20, seconds=30.0)
    args = parser.parse_args(argv)
    options = sweep_options(args)
    try:
        options.need()
        report = compare(args.sweep, options, args.forward)
    except Unavailable as why:
        print(f"bench_conv cannot run: {why}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(report_lines(report)), flush=True)
    return 0 if report.correct else 1


if __name__ == "__main__":
    sys.exit(main())
