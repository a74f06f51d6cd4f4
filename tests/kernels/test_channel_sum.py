"""The PTX of the sums over channels, run here lane by lane, and the layout that it takes for granted."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from ssm_modal.kernels.scan.channel_sum import APART, WARP, assembly
from tests.kernels.test_aot import run_without_interpreter

SHAPES = [(16, 32), (32, 16), (64, 8), (128, 4), (256, 2)]
LANES = torch.arange(WARP)
MMA = re.compile(r"mma\S+ \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\}")


def truncated(x: torch.Tensor) -> torch.Tensor:
    """fp32 as a tensor core reads it for tf32: the last 13 bits do not count."""
    return (x.contiguous().view(torch.int32) & -0x2000).view(torch.float32)


def product(a: list[torch.Tensor], b: list[torch.Tensor], c: list[torch.Tensor]) -> list[torch.Tensor]:
    """D = A B + C of m16n8k8 from and to the registers (32,) of the lanes, as the PTX manual lays them
    out."""
    group, inside = LANES // 4, LANES % 4
    A, B, C = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    for i in range(4):
        A[group + 8 * (i % 2), inside + 4 * (i // 2)] = truncated(a[i])
        C[group + 8 * (i // 2), 2 * inside + i % 2] = c[i]
    for i in range(2):
        B[inside + 4 * i, group] = truncated(b[i])
    D = A @ B + C
    return [D[group + 8 * (i // 2), 2 * inside + i % 2] for i in range(4)]


def run_tiles(code: str, tiles: list[torch.Tensor], memory: torch.Tensor | None = None) -> torch.Tensor:
    """The outputs (R, 32) of `code` for the registers (R, 32) of two tiles, and address 0 of `memory`."""
    count = tiles[0].shape[0]
    values: dict[str, torch.Tensor] = {}
    for k, tile in enumerate(tiles):
        values |= {f"${(1 + k) * count + i}": tile[i] for i in range(count)}
    values |= {f"${3 * count + i}": LANES for i in range(count)}
    values |= {f"${4 * count + i}": LANES * 0 for i in range(count)}
    run(code, values, memory)
    return torch.stack([values[f"${i}"] for i in range(count)])


def run(code: str, values: dict[str, torch.Tensor], memory: torch.Tensor | None) -> None:
    """Run `code` on `values`, (32,) by register; `memory`: bytes of shared memory as fp32."""

    def read(name: str) -> torch.Tensor:
        if name.startswith("0f"):
            return torch.full((WARP,), int(name[2:], 16), dtype=torch.int32).view(torch.float32)
        if name.startswith("0x"):
            return torch.full((WARP,), int(name, 16), dtype=torch.int64).to(torch.int32)
        if name.isdigit():
            return torch.full((WARP,), int(name), dtype=torch.int32)
        return values[name].to(torch.int32) if values[name].dtype == torch.int64 else values[name]

    def bits(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(torch.int32) if x.dtype == torch.float32 else x.to(torch.int32)

    def number(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float32 else x.to(torch.int32).view(torch.float32)

    for line in (part.strip() for part in code.strip("{} ").split(";")):
        if not line or line.startswith(".reg"):
            continue
        op, rest = line.split(" ", 1)
        if line.startswith("@p red"):
            continue
        if op.startswith(("st.shared", "ld.shared")):
            names, place = rest.split("}, ") if op.startswith("ld") else reversed(rest.split("], "))
            names = [x.strip(" {}") for x in names.split(",")]
            base, _, more = place.strip("[] ").partition(" + ")
            at = (read(base) + int(more or 0)) // 4
            for i, name in enumerate(names):
                if op.startswith("st"):
                    memory[at + i] = values[name]
                else:
                    values[name] = memory[at + i]
            continue
        if op.startswith("mma"):
            to, a, b, c = ([x.strip() for x in names.split(",")] for names in MMA.search(line).groups())
            given = [[number(read(x)) for x in names] for names in (a, b, c)]
            values |= dict(zip(to, product(*given)))
            continue
        to, *args = (x.strip() for x in rest.split(","))
        if op in ("mov.f32", "mov.b32", "mov.u32"):
            values[to] = number(read(args[0])) if op == "mov.f32" else bits(read(args[0]))
        elif op == "and.b32":
            values[to] = bits(read(args[0])) & bits(read(args[1]))
        elif op == "mad.lo.u32":
            values[to] = bits(read(args[0])) * int(args[1]) + bits(read(args[2]))
        elif op == "shr.u32":
            values[to] = bits(read(args[0])) >> int(args[1])
        elif op in ("setp.ne.u32", "setp.eq.u32"):
            same = bits(read(args[0])) == int(args[1])
            values[to] = same if ".eq." in op else ~same
        elif op in ("selp.f32", "selp.b32"):
            values[to] = torch.where(values[args[2]], read(args[0]), read(args[1]))
        elif op == "shfl.sync.bfly.b32":
            values[to] = read(args[0])[LANES ^ int(args[1])]
        elif op == "add.f32":
            values[to] = read(args[0]) + read(args[1])
        elif op == "sub.f32":
            values[to] = number(read(args[0])) - number(read(args[1]))
        else:
            raise AssertionError(f"unknown instruction {line}")


RED = re.compile(r"red\.global\.add(\.v\d)?\.f32 \[\$(\d+) \+ (\d+)\], \{?([^}]*?)\}?$")


def places(block_n: int, block_d: int, held: int) -> torch.Tensor:
    """(32,): where the first sum of each lane belongs; the same arithmetic as in `sum_place`."""
    states, channel = block_n * block_d // WARP, LANES % block_d
    if block_d >= 4:
        v = channel // 4 * held
        tile, i = v // 4, 4 * (channel % 4) + v % 4
    else:
        v = channel * held
        tile, i = v // states, v % states
    return tile * block_n + LANES // block_d * states + i


def _in_order(sums: torch.Tensor, block: int) -> torch.Tensor:
    """Sums (..., states) as they stand in memory, the states of a lane together, in the order of states.

    block: channels of a tile. The law of `matrix_gradients`.
    """
    share = WARP // block
    if share == 1 or sums.shape[-1] <= share:
        return sums
    return sums.unflatten(-1, (share, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("block_n", "block_d"), SHAPES)
def test_every_sum_lands_in_its_place(block_n: int, block_d: int, split: bool, vectors: bool) -> None:
    """Each state's sum of either tile is added once, the states of a lane together."""
    code = assembly(block_n, block_d, split, shared=False, vectors=vectors)
    held = block_n * block_d // WARP
    assert len(code.sums_constraints.split(",")) == 4 * held
    tiles = [torch.randn(block_n, block_d) for _ in range(2)]
    channel, rest = LANES % block_d, WARP // block_d
    # Register i of a lane is state i * rest + lane // block_d.
    n = torch.arange(held)[:, None] * rest + (LANES // block_d)[None, :]
    out = run_tiles(code.sums, [tile[n, channel.expand_as(n)] for tile in tiles])

    found, times = torch.zeros(2 * block_n), torch.zeros(2 * block_n)
    first = places(block_n, block_d, code.held)
    added = []
    for line in (part.strip() for part in code.add.split(";") if "red" in part):
        vector, address, at, names = RED.match(line).groups()
        assert int(address) == 2 * held
        registers = [int(name.strip()[1:]) - held for name in names.split(",")]
        assert vector == (f".v{len(registers)}" if len(registers) > 1 else None)
        assert int(at) % (4 * len(registers)) == 0
        assert not (first % len(registers)).any(), "vectors must be aligned"
        for k, register in enumerate(registers):
            found[first + int(at) // 4 + k] += out[register]
            times[first + int(at) // 4 + k] += 1
        added += registers
    assert added == list(range(code.held))
    assert (len(added) > code.add.count("red")) == (vectors and code.held > 1)
    assert times.tolist() == [1.0] * (2 * block_n)
    exact = split or block_d < 4
    wanted = torch.stack([tile.sum(1) for tile in tiles])
    torch.testing.assert_close(
        _in_order(found.view(2, block_n), block_d),
        wanted,
        rtol=1e-5 if exact else 1e-3,
        atol=1e-5 if exact else 2e-2,
    )
    assert len(code.add_constraints.split(",")) == 3 * held


def test_few_states_meet_in_shared_memory_alone() -> None:
    with pytest.raises(ValueError, match="take fewer steps"):
        assembly(8, WARP, False, shared=False, vectors=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("block_n", [1, 2, 4, 8, 16])
def test_sums_meet_in_shared_memory(block_n: int, split: bool) -> None:
    """Two steps side by side; each lane of the flush gets four sums of one tile of one step."""
    code = assembly(block_n, WARP, split, shared=True, vectors=True)
    assert code.held == 0
    steps = [[torch.randn(block_n, WARP) for _ in range(2)] for _ in range(2)]
    memory = torch.full((4 * APART // 4,), float("nan"))
    for j, tiles in enumerate(steps):
        run_tiles(code.sums, tiles, memory[2 * j * APART // 4 :])
    parts = max(1, block_n // 4)
    # The same arithmetic as in `flush_channels`.
    part, tile, j = LANES % parts, LANES // parts % 2, LANES // (2 * parts)
    place = (j.clamp(max=1) * 2 + tile) * APART + part * 16
    values = {"$1": place, "$3": LANES * 0 + 1}
    run(code.add, values, memory)
    found = torch.stack([values[f"a{i}"] for i in range(4)], 1)
    padded = max(4, block_n)
    for k in range(2):
        for m in range(2):
            wanted = torch.zeros(padded)
            wanted[:block_n] = steps[k][m].sum(1)
            lanes = (j == k) & (tile == m)
            assert int(lanes.sum()) == parts
            torch.testing.assert_close(
                found[lanes].flatten(), wanted, rtol=1e-5 if split else 1e-3, atol=1e-5 if split else 2e-2
            )
    assert code.add.count("@p red.global.add.v4.f32 [$2], {a0, a1, a2, a3};") == 1
    alone = assembly(block_n, WARP, split, shared=True, vectors=False).add
    assert all(f"@p red.global.add.f32 [$2 + {4 * i}], a{i};" in alone for i in range(4))
    assert "v4.f32 [$2]" not in alone


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
    for word in ("mma" if block_d > 2 else "shfl.sync.bfly.b32 r", "ld.shared.v4"):
        pattern = rf"tt.elementwise_inline_asm .*{{word}}.*?-> tensor<\\d+x\\d+x\\S+?, (#blocked\\d*)>"
        found = re.findall(pattern, text)
        assert found, (case.config, word)
        assert {{layouts[name] for name in found}} == {{wanted}}, (case.config, word, layouts)
    print(case.config)
"""


OLDER = """
from dataclasses import replace
import torch
from ssm_modal.kernels.aot import compile_case
from ssm_modal.kernels.scan import triton_bwd, triton_fwd
from ssm_modal.kernels.scan.channel_sum import channel_sum

for case in [*triton_fwd.aot_cases(), *triton_bwd.aot_cases()]:
    if case.config == "N16 bf16":
        if case.name == "grad_kernel":
            case = replace(case, args=case.args | channel_sum(16, 32, 4, torch.bfloat16, vectors=False))
        compile_case(case, capability=80)
        print(case.name)
"""


def test_compiles_for_capability_8() -> None:
    """The oldest GPUs served have no addition of vectors to memory."""
    done = run_without_interpreter(OLDER, 200)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {
        "chunk_state_kernel", "output_kernel", "chunk_grad_kernel", "grad_kernel"
    }  # fmt: skip


@pytest.mark.slow
def test_layout_of_every_shipped_tile() -> None:
    """The assembly sees the R states of a lane in order, channels across the low bits of its number."""
    done = run_without_interpreter(LAYOUT, 280)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("\n")) > 3
