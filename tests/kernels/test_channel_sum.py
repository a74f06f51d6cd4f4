"""The PTX of the sums over channels, run here lane by lane, and the layout that it takes for granted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ssm_modal.kernels.scan.channel_sum import WARP, assembly
from tests.kernels.test_aot import run_without_interpreter

SHAPES = [(16, 32), (8, 32), (4, 32), (2, 32), (1, 32), (32, 16), (64, 8), (128, 4), (256, 2)]


def run(code: str, states: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """The outputs (R, 32) of `code` for registers (R, 32); channel: (32,) the lanes' channel numbers."""
    count = states.shape[0]
    values: dict[str, torch.Tensor] = {f"${count + i}": states[i] for i in range(count)}
    values |= {f"${2 * count + i}": channel for i in range(count)}
    lanes = torch.arange(WARP)
    for line in code.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.strip().split(" ", 1)
        to, *args = (x.strip() for x in rest.split(","))
        if op == "mov.f32":
            values[to] = torch.zeros(WARP) if args[0] == "0f00000000" else values[args[0]].clone()
        elif op == "and.b32":
            values[to] = values[args[0]] & int(args[1])
        elif op == "setp.ne.u32":
            values[to] = values[args[0]] != int(args[1])
        elif op == "selp.f32":
            values[to] = torch.where(values[args[2]], values[args[0]], values[args[1]])
        elif op == "shfl.sync.bfly.b32":
            values[to] = values[args[0]][lanes ^ int(args[1])]
        elif op == "add.f32":
            values[to] = values[args[0]] + values[args[1]]
        else:
            raise AssertionError(f"unknown instruction {line}")
    return torch.stack([values[f"${i}"] for i in range(count)])


@pytest.mark.parametrize(("block_n", "block_d"), SHAPES)
def test_every_sum_lands_in_its_place(block_n: int, block_d: int) -> None:
    """Where `add_row` writes what: each state's sum once, by the lane and register that hold it."""
    code, constraints = assembly(block_n, block_d)
    held = block_n * block_d // WARP
    assert len(constraints.split(",")) == 3 * held
    tile = torch.randn(block_n, block_d)
    lane = torch.arange(WARP)
    channel, rest = lane % block_d, WARP // block_d
    # Register i of a lane is state i * rest + lane // block_d.
    n = torch.arange(held)[:, None] * rest + (lane // block_d)[None, :]
    out = run(code, tile[n, channel.expand_as(n)], channel)

    alike = max(1, block_d // held)
    first = max(1, held // block_d) * rest
    found = torch.zeros(block_n)
    times = torch.zeros(block_n)
    if block_d == WARP:
        for at in range(WARP):
            if at % alike == 0:
                found[at // alike] += out[0, at]
                times[at // alike] += 1
    else:
        for register in range(held):
            for at in range(WARP):
                if n[register, at] < first:
                    state = channel[at] * first + n[register, at]
                    found[state] += out[register, at]
                    times[state] += 1
    assert times.tolist() == [1.0] * block_n
    torch.testing.assert_close(found, tile.sum(1), rtol=1e-5, atol=1e-5)


LAYOUT = f"""
import re
from ssm_modal.kernels.aot import compile_case
from ssm_modal.kernels.scan import triton_bwd

for case in triton_bwd.aot_cases():
    if case.name != "grad_kernel" or case.minor:
        continue
    text = compile_case(case).asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\\d*) = #ttg.blocked<\\{{(.*?)\\}}>", text))
    block_d = case.args["BLOCK_D"]
    wanted = (
        f"sizePerThread = [1, 1], threadsPerWarp = [{{{WARP} // block_d}}, {{block_d}}], "
        "warpsPerCTA = [1, 1], order = [1, 0]"
    )
    found = re.findall(r"tt.elementwise_inline_asm .*shfl.*?-> tensor<\\S+?, (#blocked\\d*)>", text)
    assert found, case.config
    assert {{layouts[name] for name in found}} == {{wanted}}, (case.config, layouts)
    print(case.config)
"""


@pytest.mark.slow
def test_layout_of_every_shipped_tile() -> None:
    """The assembly sees the R states of a lane in order, channels across the low bits of its number."""
    done = run_without_interpreter(LAYOUT, 280)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("\n")) > 3
