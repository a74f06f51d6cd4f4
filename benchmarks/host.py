"""What a call costs the host: eager calls on small tensors, and the first call of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Bar, Check, Figure, Options, Report, case, relative_error
from benchmarks.inputs import ScanInputs, scan_inputs
from benchmarks.reference import OUTPUT, run_scan, scan_reference
from benchmarks.scan import OURS
from benchmarks.timing import Candidate, admit, host_microseconds
from ssm_modal.kernels.conv import causal_conv1d, causal_conv1d_ref
from ssm_modal.kernels.norm import rms_norm, rms_norm_ref

DTYPE = torch.bfloat16
MOST = 100.0  # microseconds
FIRST_CALL = 3.0  # seconds, with a warm cache
ROOT = Path(__file__).resolve().parents[1]


@case(quick=True, seconds=4.0)
def host(options: Options) -> Report:
    """Host time of an eager forward without gradients on small tensors, the GPU not waited for."""
    options.need()
    x = scan_inputs(*options.shrink(1, 64, 64, 16), device=options.device, dtype=DTYPE)
    whats = ("selective_scan", "causal_conv1d", "rms_norm")
    bars = options.bars(*(Bar(what, MOST) for what in whats))
    report = Report("host", f"{x.shape}, no gradients", OURS, bars=bars)
    for what, ways in zip(
        whats, (_scans(x, options, report), _convs(x, options, report), _norms(x, options))
    ):
        admitted = [way for way in ways if admit(report, what, way)]
        if not report.correct:
            return report
        _in_turn(report, what, admitted, options)
    return report


def _in_turn(report: Report, what: str, ways: list[Candidate], options: Options) -> None:
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    with torch.no_grad():
        for way in ways:
            host_microseconds(way.run, options.device)
        for _ in range(options.repeats):
            for way in ways:
                samples[way.name].append(host_microseconds(way.run, options.device))
    report.figures += [Figure(what, name, tuple(taken), "us") for name, taken in samples.items()]


def _quiet(name: str, call: Callable[[], object], verify: Callable[[object], list[Check]]) -> Candidate:
    def run() -> object:
        with torch.no_grad():
            return call()

    return Candidate(name, run, verify)


def _scans(x: ScanInputs, options: Options, report: Report) -> list[Candidate]:
    reference = scan_reference(x, gradients=False)
    given, backend = x.given, options.backend("selective_scan")
    found = [_quiet(OURS, lambda: run_scan(given, backend=backend), reference.checks)]

    def mamba_ssm() -> Candidate:
        other = peers.MambaSsmScan(x)
        return _quiet(peers.MAMBA_SSM, other.forward, lambda r: reference.checks(peers.turned(r)))

    return found + peers.offer(report.notes, peers.MAMBA_SSM, mamba_ssm)


def _convs(x: ScanInputs, options: Options, report: Report) -> list[Candidate]:
    u: Tensor = x.u
    make = torch.Generator(u.device).manual_seed(1)
    weight = torch.randn(u.shape[2], 4, generator=make, device=u.device, dtype=DTYPE)
    right = causal_conv1d_ref(u.double(), weight.double(), None, activation="silu")
    assert isinstance(right, Tensor)
    verify = _close("out", right)
    backend = options.backend("causal_conv1d")
    found = [_quiet(OURS, lambda: causal_conv1d(u, weight, activation="silu", backend=backend), verify)]

    def beside() -> Candidate:
        function = peers.peer("causal_conv1d", "causal_conv1d_fn")
        turned = u.transpose(1, 2)

        def run() -> Tensor:
            return function(turned, weight, None, activation="silu").transpose(1, 2)

        return _quiet(peers.CAUSAL_CONV1D, run, verify)

    return found + peers.offer(report.notes, peers.CAUSAL_CONV1D, beside)


def _norms(x: ScanInputs, options: Options) -> list[Candidate]:
    u: Tensor = x.u
    weight, residual = torch.ones(u.shape[2], device=u.device, dtype=DTYPE), u.float()
    right = rms_norm_ref(u.double(), weight.double(), residual=residual.double())
    backend = options.backend("rms_norm")

    def ours() -> Tensor:
        return rms_norm(u, weight, residual=residual, residual_in_fp32=True, backend=backend)[0]

    return [_quiet(OURS, ours, _close("normed", right[0]))]


def _close(name: str, right: Tensor) -> Callable[[object], list[Check]]:
    def verify(result: object) -> list[Check]:
        assert isinstance(result, Tensor)
        return [Check(name, relative_error(result, right), OUTPUT[DTYPE])]

    return verify


@case(seconds=45.0)
def first_call(options: Options) -> Report:
    """Seconds of the first scan of a process, forward, then backward, with a cold and a warm Triton cache."""
    options.need()
    whats = ("first forward, warm", "first of both, warm")
    bars = options.bars(*(Bar(what, FIRST_CALL) for what in whats))
    shape = "selective_scan B1 D2048 L8192 N16 bf16, a process each, torch and GPU ready"
    report = Report("first_call", shape, OURS, bars=bars)
    warm = 1 if options.quick or options.tiny else 2
    with tempfile.TemporaryDirectory() as cache:
        runs = [_process(cache, options) for _ in range(1 + warm)]
    for one in runs:
        report.checks += [Check(name, error, limit) for name, error, limit in one["checks"]]
    cold, *others = runs
    names = {"import": "import of the op", "forward": "first forward", "both": "first of both"}
    for key, what in names.items():
        report.figures.append(Figure(f"{what}, cold", OURS, (cold[key],), "s"))
        report.figures.append(Figure(f"{what}, warm", OURS, tuple(one[key] for one in others), "s"))
    report.figures.append(Figure("a later call of both", OURS, tuple(one["later"] for one in runs), "s"))
    return report


def _process(cache: str, options: Options) -> dict[str, Any]:
    """One run of first_call.py in a process of its own, whose Triton cache is the folder `cache`."""
    command = [sys.executable, "-m", "benchmarks.first_call", str(options.device), str(int(options.tiny))]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": cache,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process of a first call ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
