"""`ssm-modal doctor`: what this installation can do, what is missing, and the command that mends it.

Needs the core dependencies alone. Exits with 1 where something is broken; a missing extra is none of that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import ssm_modal
from ssm_modal.kernels import (
    causal_conv1d,
    causal_conv1d_ref,
    causal_conv1d_step,
    cross_entropy,
    cross_entropy_ref,
    lti_scan,
    lti_scan_ref,
    rms_norm,
    rms_norm_ref,
    selective_scan,
    selective_scan_ref,
    selective_scan_step,
)
from ssm_modal.kernels.dispatch import SUPPORT, explain, triton_installed

CORE = ("torch", "triton", "einops", "safetensors", "huggingface_hub")

# What each extra installs, as pyproject.toml lists it: its distributions by the name they are imported by.
EXTRAS: dict[str, dict[str, str]] = {
    "train": {
        "lightning": "lightning",
        "jsonargparse": "jsonargparse",
        "torchmetrics": "torchmetrics",
        "rich": "rich",
        "tensorboard": "tensorboard",
        "matplotlib": "matplotlib",
    },
    "text": {"tokenizers": "tokenizers"},
    "audio": {"torchaudio": "torchaudio", "soundfile": "soundfile"},
    "genomics": {"biopython": "Bio", "pysam": "pysam", "h5py": "h5py", "numpy": "numpy"},
    "vision": {"timm": "timm", "torchvision": "torchvision"},
    "quant": {"bitsandbytes": "bitsandbytes"},
    "adapters": {"peft": "peft"},
    "eval": {"lm-eval": "lm_eval"},
}

DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# Largest allowed ||out - ref|| / ||ref||, the reference in fp64 on inputs rounded alike.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float64: 1e-10}


@dataclass
class Findings:
    """What is broken (exit code 1) and what is only missing, each with what mends it."""

    broken: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ssm-modal doctor`."""
    parser.add_argument("--no-check", action="store_true", help="do not run the ops against their references")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 1 where something is broken."""
    findings = Findings()
    _versions(findings)
    devices = _devices(findings)
    _compiler(findings)
    _backends(devices, findings, check=not args.no_check)
    _conclude(findings)
    return 1 if findings.broken else 0


def _title(text: str) -> None:
    print(f"\n{text}")


def _row(name: str, value: str) -> None:
    print(f"  {name:<16} {value}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(findings: Findings) -> None:
    print("Versions")
    _row("ssm-modal", ssm_modal.__version__)
    _row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        findings.broken.append(f"Python {platform.python_version()} is not 3.11 or 3.12: use one of these")
    for name in CORE:
        version = _version(name)
        if version is not None:
            _row(name, version)
        elif name == "triton":
            _row(name, "not installed")
            if sys.platform == "linux" and torch.cuda.is_available():
                findings.missing.append("Triton, so GPU ops run in plain torch: pip install triton")
        else:
            _row(name, "not installed")
            findings.broken.append(f"{name} is missing: pip install ssm-modal")
    _title("Extras")
    for extra, distributions in EXTRAS.items():
        there = {d: _version(d) for d, module in distributions.items() if importlib.util.find_spec(module)}
        absent = [d for d in distributions if d not in there]
        if absent:
            findings.missing.append(f"the extra {extra}: pip install 'ssm-modal[{extra}]'")
        names = ", ".join(f"{d} {v}" for d, v in there.items())
        _row(extra, "; ".join(filter(None, [names, f"missing: {', '.join(absent)}" if absent else ""])))
    if importlib.util.find_spec("torchaudio"):
        _same_cuda(findings)


def _same_cuda(findings: Findings) -> None:
    # torchaudio refuses at import a torch built for another CUDA version.
    try:
        import torchaudio  # noqa: F401
    except Exception as error:
        findings.broken.append(
            f"torchaudio does not import beside this torch ({error}): "
            "pip install --force-reinstall 'ssm-modal[audio]'"
        )


def _devices(findings: Findings) -> list[torch.device]:
    _title("Devices")
    _row("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch")
    devices = [torch.device("cpu")]
    _row("CUDA of torch", torch.version.cuda or "none (a CPU build of torch)")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            memory = about.total_memory / 2**30
            _row(f"cuda:{i}", f"{about.name}, {memory:.0f} GiB, capability {about.major}.{about.minor}")
        devices.append(torch.device("cuda", torch.cuda.current_device()))
        return devices
    _row("cuda", "no GPU that torch can use")
    if shutil.which("nvidia-smi") is not None:
        reason = (
            "torch is a CPU build"
            if torch.version.cuda is None
            else "its driver may be too old or not running"
        )
        findings.missing.append(
            f"the NVIDIA GPU is not used ({reason}): see https://pytorch.org/get-started for a torch that "
            "fits, and nvidia-smi for the driver"
        )
    return devices


def _compiler(findings: Findings) -> None:
    _title("Compiled CPU kernels")
    found = next((path for path in map(shutil.which, _compilers()) if path), None)
    _row("C compiler", found or "none")
    if os.environ.get("SSM_MODAL_NO_CPU_KERNELS", "0").lower() in ("1", "true", "on", "yes"):
        _row("kernels", "switched off by SSM_MODAL_NO_CPU_KERNELS")
        return
    from ssm_modal.kernels.cpu.loader import why_unavailable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = why_unavailable()
    if reason is None:
        _row("kernels", "built and loaded")
        return
    _row("kernels", f"not to be had: {' '.join(reason.split())}")
    if found is None:
        findings.missing.append(
            "a C compiler, for the fast CPU kernels: apt install gcc (or your system's way)"
        )
    else:
        findings.broken.append(f"the CPU kernels do not build or load: {' '.join(reason.split())}")


def _compilers() -> list[str]:
    named = os.environ.get("CC", "").split()
    return [*named[:1], "cc", "gcc", "clang"]


def _backends(devices: list[torch.device], findings: Findings, *, check: bool) -> None:
    _title("Which backend serves each op, and why" + ("; checked against its reference" if check else ""))
    for device in devices:
        for op in SUPPORT:
            for dtype in DTYPES:
                name = str(dtype).removeprefix("torch.")
                line = f"{device.type:<5} {op:<19} {name:<9}"
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        choice = explain(op, device=device, dtype=dtype)
                        error = relative_error(op, device, dtype) if check else 0.0
                except Exception as problem:
                    words = " ".join(str(problem).split())
                    print(f"  {line} FAILS: {words}")
                    findings.broken.append(f"{op} in {name} on {device.type} fails: {words}{_mend(device)}")
                    continue
                shown = f", error {error:.1e}" if check else ""
                print(f"  {line} {choice.backend:<7} ({choice.reason}){shown}")
                if not error <= TOLERANCE[dtype]:
                    findings.broken.append(
                        f"{op} in {name} on {device.type} is wrong: relative error {error:.2g}, allowed "
                        f"{TOLERANCE[dtype]:.2g}{_mend(device)}"
                    )


def _mend(device: torch.device) -> str:
    if device.type == "cuda" and triton_installed():
        return "; SSM_MODAL_BACKEND=torch works round it, pip install --upgrade torch triton may mend it"
    return "; SSM_MODAL_BACKEND=torch works round it"


def _conclude(findings: Findings) -> None:
    for title, items in (("Missing", findings.missing), ("Broken", findings.broken)):
        if items:
            _title(title)
            for item in items:
                print(f"  - {item}")
    print("\n" + ("Something is broken." if findings.broken else "All that is installed works."))


# ---------------------------------------------------------------------- the ops against their references


def relative_error(op: str, device: torch.device, dtype: torch.dtype) -> float:
    """||out - ref|| / ||ref|| of `op` on a small input, the reference in fp64 on inputs rounded alike.

    Infinite where the output is not finite.
    """
    out, ref = CHECKS[op](device, dtype)
    out = out.detach().double().cpu()
    error = float(torch.linalg.vector_norm(out - ref) / torch.linalg.vector_norm(ref))
    return error if error == error else float("inf")


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _scan(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, z, B, C = (_draw(2, 37, n, seed=s).to(dtype) for s, n in ((0, 8), (1, 8), (2, 5), (3, 5)))
    delta = torch.nn.functional.softplus(_draw(2, 37, 8, seed=4)).to(dtype)
    A, D = -torch.exp(_draw(8, 5, seed=5)).to(wide), _draw(8, seed=6).to(wide)
    out = selective_scan(*(t.to(device) for t in (u, delta, A, B, C)), D=D.to(device), z=z.to(device))
    ref = selective_scan_ref(*(t.double() for t in (u, delta, A, B, C)), D=D.double(), z=z.double())
    assert isinstance(out, Tensor)
    assert isinstance(ref, Tensor)
    return out, ref


def _lti(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
    u = _draw(2, 37, 8, seed=0).to(dtype)
    dt, D = torch.exp(_draw(8, seed=1) - 3).to(wide), _draw(8, seed=2).to(wide)
    A = torch.complex(-torch.exp(_draw(8, 4, seed=3)), 3 * _draw(8, 4, seed=4)).to(narrow)
    B, C = (torch.complex(_draw(8, 4, seed=s), _draw(8, 4, seed=s + 1)).to(narrow) for s in (5, 7))
    out = lti_scan(*(t.to(device) for t in (u, dt, A, B, C)), D=D.to(device))
    doubled = [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (u, dt, A, B, C)]
    ref = lti_scan_ref(*doubled, D=D.double())
    assert isinstance(out, Tensor)
    assert isinstance(ref, Tensor)
    return out, ref


def _conv(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight, bias = (_draw(*shape, seed=s).to(dtype) for s, shape in enumerate(((2, 37, 8), (8, 4), (8,))))
    out = causal_conv1d(x.to(device), weight.to(device), bias.to(device), activation="silu")
    ref = causal_conv1d_ref(x.double(), weight.double(), bias.double(), activation="silu")
    assert isinstance(out, Tensor)
    assert isinstance(ref, Tensor)
    return out, ref


def _norm(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight = _draw(2, 37, 24, seed=0).to(dtype), _draw(24, seed=1).to(dtype)
    out, ref = rms_norm(x.to(device), weight.to(device)), rms_norm_ref(x.double(), weight.double())
    assert isinstance(out, Tensor)
    assert isinstance(ref, Tensor)
    return out, ref


def _loss(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, targets = _draw(37, 24, seed=0).to(dtype), torch.arange(37) % 24
    _, grad = cross_entropy(logits.to(device), targets.to(device), gradient=True)
    _, ref = cross_entropy_ref(logits.double(), targets, gradient=True)
    assert grad is not None
    assert ref is not None
    return grad, ref


def _scan_step(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, z, B, C = (_draw(2, n, seed=s).to(dtype) for s, n in ((0, 8), (1, 8), (2, 5), (3, 5)))
    delta = torch.nn.functional.softplus(_draw(2, 8, seed=4)).to(dtype)
    A, state = -torch.exp(_draw(8, 5, seed=5)).to(wide), _draw(2, 8, 5, seed=6).to(wide)
    out, _ = selective_scan_step(*(t.to(device) for t in (u, delta, A, B, C, state)), z=z.to(device))
    one = [t.double().unsqueeze(1) for t in (u, delta, B, C, z)]
    ref = selective_scan_ref(one[0], one[1], A.double(), *one[2:4], z=one[4], initial_state=state.double())
    assert isinstance(ref, Tensor)
    return out, ref[:, 0]


def _conv_step(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shapes = ((2, 8), (8, 4), (8,), (2, 8, 3))
    x, weight, bias, state = (_draw(*shape, seed=s).to(dtype) for s, shape in enumerate(shapes))
    out, _ = causal_conv1d_step(*(t.to(device) for t in (x, weight, bias, state)), activation="silu")
    wide = [t.double() for t in (x.unsqueeze(1), weight, bias)]
    ref = causal_conv1d_ref(*wide, activation="silu", initial_state=state.double())
    assert isinstance(ref, Tensor)
    return out, ref[:, 0]


CHECKS: dict[str, Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor]]] = {
    "selective_scan": _scan,
    "lti_scan": _lti,
    "causal_conv1d": _conv,
    "rms_norm": _norm,
    "cross_entropy": _loss,
    "selective_scan_step": _scan_step,
    "causal_conv1d_step": _conv_step,
}
