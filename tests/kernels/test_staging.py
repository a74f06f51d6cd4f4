"""What the Triton scan puts into shared memory: the PTX, run here lane by lane, and how much there is."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from ssm_modal.kernels.scan.gradient_launch import gradient_bytes, gradient_stage
from ssm_modal.kernels.scan.keeping import keep_assembly
from ssm_modal.kernels.scan.launch import resident, shipped_launches
from ssm_modal.kernels.scan.prefetch import can_copy, row_copies
from ssm_modal.kernels.scan.staging import bring_assembly, read_assembly, row_bits, stage_steps
from tests.kernels.test_aot import run_without_interpreter

WARP = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILES = [(16, 32), (8, 32), (32, 16), (32, 32), (64, 8), (64, 16), (128, 4), (256, 2), (256, 4)]


def place(n: int, block_n: int, block: int) -> int:
    """Where state n of a staged row stands, in numbers: as in `states_row`, those of one lane together."""
    share = WARP // block
    return n % share * (block_n // share) + n // share


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_n", "block"), TILES)
def test_a_piece_lands_where_rows_are_read(block_n: int, block: int, dtype: torch.dtype) -> None:
    """Every number of a row of B, brought in by pieces of 16 bytes, in fp32 in its place."""
    code, numbers = bring_assembly(block_n, block, dtype)
    assert numbers * dtype.itemsize == 16
    row = torch.randn(block_n).to(dtype)
    words = row.view(torch.int32)
    found = torch.full((block_n,), float("nan"))
    for piece in range(block_n // numbers):
        _run_bring(code, words[4 * piece : 4 * piece + 4], found, place(piece * numbers, block_n, block))
    wanted = torch.empty(block_n)
    for n in range(block_n):
        wanted[place(n, block_n, block)] = row[n].float()
    assert torch.equal(found, wanted)


def _run_bring(code: str, words: torch.Tensor, memory: torch.Tensor, base: int) -> None:
    """Run the assembly of one lane whose flag is set; `base`: its address in `memory`, in numbers."""
    values: dict[str, torch.Tensor] = {}
    for line in (part.strip() for part in code.strip("{} ").split(";")):
        if (
            not line
            or line.startswith((".reg", "setp", "mov.u32 $0"))
            or re.fullmatch(r"mov.b32 w\d, 0", line)
        ):
            continue
        op, rest = line.split(" ", 1)
        if op == "@p":
            assert rest == "ld.global.v4.b32 {w0, w1, w2, w3}, [$2]"
            values |= {f"w{i}": words[i : i + 1] for i in range(4)}
        elif op.startswith("st.shared"):
            at, names = re.fullmatch(r"\[\$1 \+ (\d+)\], \{?(.*?)\}?", rest).groups()
            for i, name in enumerate(names.split(", ")):
                memory[base + int(at) // 4 + i] = values[name].view(torch.float32)[0]
        elif op == "mov.b32" and rest.startswith("{"):
            word = rest.split("}, ")[1]
            values |= dict(zip("ab", values[word].view(torch.int16)))
        elif op == "cvt.f32.f16":
            to, half = rest.split(", ")
            values[to] = values[half].view(torch.float16).float().view(1).view(torch.int32)
        else:
            to, word, *by = rest.split(", ")
            if op == "shl.b32":
                values[to] = values[word] << int(by[0])
            elif op == "and.b32":
                values[to] = values[word] & (int(by[0], 16) - (1 << 32))
            else:
                assert op == "mov.b32", line
                values[to] = values[word]


@pytest.mark.parametrize("registers", [1, 2, 4, 16])
def test_what_is_kept_is_taken_back(registers: int) -> None:
    """Each lane's registers come back from where it put them, and no two lanes share a place."""
    keep, _, take, _, leave, _, fetch, _ = keep_assembly(registers)
    wide = next(w for w in (4, 2, 1) if registers % w == 0)

    def pieces(code: str, word: str) -> list[tuple[int, list[int]]]:
        found = []
        for line in code.split(";"):
            if word in line:
                at = int(re.search(r"\+ (\d+)\]", line).group(1))
                names = re.sub(r"\[.*?\]", "", line.split("f32")[-1])
                found.append((at, [int(x) for x in re.findall(r"\$(\d+)", names)]))
        return found

    kept, taken, left = pieces(keep, "st.shared"), pieces(take, "ld.shared"), pieces(leave, "st.global")
    assert kept == left
    assert [(at, [i - registers for i in names]) for at, names in kept] == taken
    assert sorted(i for _, names in taken for i in names) == list(range(registers))
    places = [at + lane * wide * 4 for at, _ in taken for lane in range(WARP)]
    assert sorted(places) == list(range(0, registers * WARP * 4, wide * 4))
    fetched = re.findall(r"\[\$\d+ \+ (\d+)\], \[\$\d+ \+ (\d+)\], (\d+);", fetch)
    assert [(int(a), int(b), int(c)) for a, b, c in fetched] == [(at, at, wide * 4) for at, _ in taken]


def test_a_row_is_read_in_order() -> None:
    code, constraints = read_assembly(8)
    assert code == (
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$8 + 0]; ld.shared.v4.f32 {$4, $5, $6, $7}, [$8 + 16];"
    )
    assert constraints.split(",") == ["=f"] * 8 + ["r"] * 8


def test_shared_memory_of_every_shipped_launch() -> None:
    """What a kernel reserves must be below 48 KiB, and at d_state 16 twelve gradient programs fit."""
    for d_state, launch in shipped_launches():
        for dtype in DTYPES:
            assert gradient_bytes(d_state, launch, dtype) <= 48 * 1024, (d_state, dtype)
        stage = stage_steps(d_state, launch.chunk_size, launch.bwd_steps, gradient_stage(d_state))
        assert stage % launch.bwd_steps == 0
        assert launch.chunk_size % stage == 0
        if d_state == 16:
            assert resident(launch.bwd_registers, gradient_bytes(d_state, launch, torch.bfloat16)) == 12


def test_programs_by_registers_and_shared_memory() -> None:
    assert [resident(r) for r in (80, 96, 128, 168, 184, 255, None)] == [24, 20, 16, 12, 8, 8, 8]
    assert resident(128, 20 * 1024) == 10
    assert resident(16) == 32
    # A GPU with less shared memory runs fewer, and one at least.
    assert resident(128, 20 * 1024, 100 * 1024) == 4
    assert resident(128, 200 * 1024, 100 * 1024) == 1


def test_rows_are_copied_where_they_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssm_modal.kernels.scan import prefetch

    def bits(*rows: torch.Tensor) -> int:
        found = 0
        for x in rows:
            found |= row_bits(x.data_ptr(), x.stride(), x.element_size())
        return found

    wide = torch.zeros(2, 9, 264, dtype=torch.bfloat16)
    assert bits(wide[..., 8:]) % 16 == 0
    assert bits(wide[..., 4:]) % 16 == 8
    assert bits(torch.zeros(2, 9, 260, dtype=torch.bfloat16)) % 16 == 8
    monkeypatch.setattr(prefetch, "NVIDIA", type("Flag", (), {"value": True}))
    rows = wide[..., :256]
    assert can_copy(32, 256, 2, bits(rows))
    assert not can_copy(32, 250, 2, bits(rows))
    assert not can_copy(32, 256, 2, bits(rows, wide[..., 4:260]))
    # A narrow block is copied by less than 16 bytes and asks for less.
    assert can_copy(4, 256, 2, bits(wide[..., 4:260]))
    assert row_copies(torch.bfloat16, 4, True)["ROW_PIECE"] == 4
    assert row_copies(torch.float32, 32, True)["ROW_PIECE"] == 4
    assert row_copies(torch.float32, 32, False)["ROW_READ"] is None


ONE_LANE = r"""
import re
from ssm_modal.kernels.aot import compile_case
from ssm_modal.kernels.scan import triton_bwd

for case in triton_bwd.aot_cases():
    if case.name != "grad_kernel" or case.config not in ("N16 bf16", "N64 bf16", "N256 bf16"):
        continue
    text = compile_case(case).asm["ttgir"]
    layouts = dict(re.findall(r"(#blocked\d*) = #ttg.blocked<\{(.*?)\}>", text))
    pattern = r"elementwise_inline_asm .*(cp\.async\.c|st\.shared).* : tensor<(\S+?)x[a-z]\w+, (#\w+)>"
    for word, shape, name in re.findall(pattern, text):
        each, lanes = re.findall(r"(?:PerThread|PerWarp) = \[(.*?)\]", layouts[name])
        extents = zip(shape.split("x"), each.split(", "), lanes.split(", "))
        assert all(int(n) % (int(k) * int(m)) == 0 for n, k, m in extents), (word, shape, layouts[name])
        print(word)
"""


@pytest.mark.slow
def test_every_place_in_shared_memory_is_one_lanes() -> None:
    """No lane holds a copy of what another one stores or copies: of fewer pieces than lanes some are idle."""
    done = run_without_interpreter(ONE_LANE, 280)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    # Three kernels, two copies of two and of four rows, step sizes twice, and tiles.
    assert found.count("cp.async.c") >= 3 * 14
    assert found.count("st.shared") >= 3 * 3


STEP = """
from ssm_modal.kernels.aot import collect, compile_case

for case in collect(["ssm_modal.kernels.scan.triton_step", "ssm_modal.kernels.conv.triton_step"]):
    if case.args.get("d_state", case.args.get("K")) <= (16 if "d_state" in case.args else 4):
        print(case.name, case.config, compile_case(case).metadata.shared, sep=": ")
"""


@pytest.mark.slow
def test_a_step_goes_without_shared_memory() -> None:
    """Lanes that share a channel hold its output all of them: none of them may hand it on through there."""
    done = run_without_interpreter(STEP, 280)
    assert done.returncode == 0, done.stderr
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == ["0"] * 8
