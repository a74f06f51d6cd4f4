"""Decays by polynomials: the assembly, instruction by instruction, in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ssm_modal.kernels.scan.decays import TOGETHER, decay, decay_assembly


def run(code: str, given: Tensor) -> Tensor:
    """The outputs of `code` for its inputs, a row each; fp32."""
    count = given.shape[0]
    values = {f"${count + i}": row for i, row in enumerate(given)}

    def read(name: str) -> Tensor:
        if name.startswith("0f"):
            return torch.tensor(int(name[2:], 16), dtype=torch.int64).to(torch.int32).view(torch.float32)
        return values[name]

    for line in (part.strip() for part in code.strip("{} ").split(";")):
        if not line or line.startswith(".reg"):
            continue
        op, rest = line.split(" ", 1)
        to, *names = (x.strip() for x in rest.split(","))
        if op == "shl.b32":
            values[to] = (read(names[0]).long() << int(names[1])).to(torch.int32)
            continue
        x = [read(name) for name in names]
        if op == "ex2.approx.ftz.f32":
            values[to] = torch.exp2(x[0])
        elif op in ("max.NaN.f32", "min.NaN.f32"):
            values[to] = (torch.maximum if op.startswith("max") else torch.minimum)(*x)
        elif op == "add.rn.f32":
            values[to] = x[0] + x[1]
        elif op == "sub.rn.f32":
            values[to] = x[0] - x[1]
        elif op == "fma.rn.f32":
            values[to] = (x[0].double() * x[1].double() + x[2].double()).float()
        elif op == "add.s32":
            values[to] = (x[0].long() + x[1].long()).to(torch.int32)
        elif op == "mov.f32":
            values[to] = x[0]
        elif op == "mov.b32":
            # The type of a register is told by its name: i and w hold bits.
            values[to] = x[0].contiguous().view(torch.int32 if to in ("i", "w") else torch.float32)
        else:
            raise AssertionError(f"unknown instruction {line}")
    return torch.stack([values[f"${i}"] for i in range(count)])


@pytest.mark.parametrize("polynomials", [1, 2, 5])
def test_powers_of_two(polynomials: int) -> None:
    """All numbers of a lane, whichever way they are computed; as many as asked for by polynomials."""
    code, constraints = decay_assembly(polynomials)
    count = TOGETHER.value
    assert code.count("ex2.approx") == count - polynomials
    assert constraints == ",".join(["=f"] * count + ["f"] * count)
    x = torch.cat(
        [torch.linspace(-125.9, 0.5, 4001), -torch.logspace(-8, 0, 500), torch.linspace(0, 127, 300)]
    )
    out = run(code, x.expand(count, -1))
    right = torch.exp2(x.double())
    assert ((out.double() - right) / right).abs().max() < 2e-7
    assert (run(code, torch.zeros(count, 1)) == 1).all()


def test_extremes() -> None:
    """A decay too small for fp32 is as good as 0, growth too large infinite, and NaN stays."""
    code, _ = decay_assembly(TOGETHER.value)
    out = run(
        code, torch.tensor([-126.5, -1e5, -float("inf"), 129.0, float("inf"), float("nan")]).expand(16, -1)
    )
    assert (out[:, :3] <= 2.0**-126).all()
    assert (out[:, :3] >= 0).all()
    assert torch.isinf(out[:, 3:5]).all()
    assert torch.isnan(out[:, 5]).all()


def test_where_there_are_none() -> None:
    """A lane with fewer numbers than are taken together computes them as they are; so does no polynomial."""
    assert decay(8, 32, 1)["DECAY"] is None
    assert decay(16, 32, 0)["DECAY"] is None
