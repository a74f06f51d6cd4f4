"""Inputs of the selective scan as a Mamba layer makes them, and the reference's results on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_modal.kernels.scan.ref import selective_scan_ref


@dataclass(frozen=True)
class ScanInputs:
    """u, delta, z, dout: (batch, length, d_inner); A: (d_inner, d_state); B, C: (batch, length, d_state);
    D, delta_bias: (d_inner,). `dout` is the gradient handed to the output."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    delta_bias: Tensor
    dout: Tensor

    @property
    def shape(self) -> str:
        batch, length, d_inner = self.u.shape
        return f"B{batch} D{d_inner} L{length} N{self.A.shape[1]} {short(self.u.dtype)}"

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The eight inputs."""
        return (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias)

    def leaves(self) -> tuple[Tensor, ...]:
        """The eight inputs, each a leaf that takes a gradient."""
        return tuple(t.detach().requires_grad_() for t in self.given)


def short(dtype: torch.dtype) -> str:
    """bf16, fp16, fp32 or fp64."""
    return {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.float64: "fp64",
    }[dtype]


GRADIENTS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias")


def scan_inputs(
    batch: int, d_inner: int, length: int, d_state: int, *, device: torch.device | str, dtype: torch.dtype
) -> ScanInputs:
    """Random inputs with Mamba's initial A (-1 .. -d_state) and step sizes (0.001 to 0.1 after softplus).

    B and C: (batch, length, d_state). A, D, delta_bias in fp32. Drawn on `device` in `dtype`: a problem of
    2^32 elements is made in place.
    """
    make = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=dtype)

    spread = torch.rand(d_inner, generator=make, device=device)
    dt = torch.exp(spread * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    A = -torch.arange(1, d_state + 1, dtype=torch.float32, device=device).repeat(d_inner, 1)
    return ScanInputs(
        u=normal(batch, length, d_inner),
        delta=normal(batch, length, d_inner),
        A=A,
        B=normal(batch, length, d_state),
        C=normal(batch, length, d_state),
        D=torch.ones(d_inner, device=device),
        z=normal(batch, length, d_inner),
        delta_bias=torch.log(torch.expm1(dt)),
        dout=normal(batch, length, d_inner),
    )


def _slab(x: ScanInputs, channels: slice) -> ScanInputs:
    """The inputs of some channels alone, in fp64: channels meet only in the gradients of B and C."""
    wide = replace(x, **{k: getattr(x, k).double() for k in x.__dataclass_fields__})
    over = {k: getattr(wide, k)[..., channels] for k in ("u", "delta", "z", "dout", "D", "delta_bias")}
    return replace(wide, A=wide.A[channels], **over)


def reference_output(x: ScanInputs, slab: int = 512) -> Tensor:
    """The reference loop's output in fp64, some channels at a time."""
    outs = []
    for start in range(0, x.u.shape[2], slab):
        s = _slab(x, slice(start, start + slab))
        with torch.no_grad():
            out = selective_scan_ref(
                s.u, s.delta, s.A, s.B, s.C, D=s.D, z=s.z, delta_bias=s.delta_bias, delta_softplus=True
            )
        assert isinstance(out, Tensor)
        outs.append(out)
    return torch.cat(outs, dim=2)


def reference_gradients(x: ScanInputs, slab: int = 256) -> tuple[Tensor, ...]:
    """Gradients of <out, dout> in fp64, in the order of GRADIENTS, some channels at a time.

    By the chain rule written out: autograd through the loop makes a gradient of full length at every step and
    would take minutes at a length of 2,048. `tests/test_benchmarks.py` holds it against autograd.
    """
    parts = [_slab_gradients(_slab(x, slice(at, at + slab))) for at in range(0, x.u.shape[2], slab)]
    joined = []
    for name, pieces in zip(GRADIENTS, zip(*parts)):
        if name in ("dB", "dC"):
            joined.append(torch.stack(pieces).sum(0))
        else:
            joined.append(torch.cat(pieces, dim=0 if name == "dA" else -1))
    return tuple(joined)


def _slab_gradients(x: ScanInputs) -> tuple[Tensor, ...]:
    before = x.delta + x.delta_bias
    dt = F.softplus(before)
    dtu, dy = dt * x.u, x.dout * F.silu(x.z)
    h = x.u.new_zeros(x.u.shape[0], *x.A.shape)
    states, decays, ys = [h], [], []
    for t in range(x.u.shape[1]):
        decays.append(torch.exp(dt[:, t, :, None] * x.A))
        h = decays[t] * h + dtu[:, t, :, None] * x.B[:, t, None, :]
        states.append(h)  # states[t] stands before step t
        ys.append((h * x.C[:, t, None, :]).sum(-1))
    y = (torch.stack(ys, dim=1) if ys else torch.zeros_like(x.u)) + x.D * x.u

    ddt, ddtu, dA = torch.zeros_like(dt), torch.zeros_like(dt), torch.zeros_like(x.A)
    dB, dC = torch.zeros_like(x.B), torch.zeros_like(x.C)
    later = torch.zeros_like(h)
    for t in reversed(range(x.u.shape[1])):
        dh = later + dy[:, t, :, None] * x.C[:, t, None, :]
        dC[:, t] = (dy[:, t, :, None] * states[t + 1]).sum(1)
        dB[:, t] = (dh * dtu[:, t, :, None]).sum(1)
        ddtu[:, t] = (dh * x.B[:, t, None, :]).sum(-1)
        later = dh * decays[t]
        dexponent = later * states[t]
        ddt[:, t] = (dexponent * x.A).sum(-1)
        dA += (dexponent * dt[:, t, :, None]).sum(0)

    sigmoid = torch.sigmoid(x.z)
    dz = x.dout * y * sigmoid * (1 + x.z * (1 - sigmoid))
    ddelta = (ddt + ddtu * x.u) * torch.sigmoid(before)
    du = ddtu * dt + x.D * dy
    return du, ddelta, dA, dB, dC, (dy * x.u).sum((0, 1)), dz, ddelta.sum((0, 1))
