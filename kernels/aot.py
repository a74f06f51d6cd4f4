"""Ahead-of-time compilation of the Triton kernels: registers, spills and shared memory, read without a GPU.

    python -m ssm_modal.kernels.aot [--capability 90] [--only scan] [--jobs 2]

Every module `ssm_modal.kernels.*.triton_*` may define `aot_cases() -> list[AotCase]`, one case for each
configuration it ships; such modules are found by name, nothing needs registering. A case gives the kernel's
arguments by name as a launch would see them, and is specialised by Triton's own rule (an int of 1 becomes a
constant, a multiple of 16 is known to be one). Kernels must have been defined without `TRITON_INTERPRET=1`:
an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of one Triton kernel.

    kernel: the function that `triton.jit` returned. config: a short name for the table. args: every parameter
    of the kernel by name: a pointer as its Triton type ("*bf16", "*fp32", "*i64"; taken as 16-byte aligned),
    None for an absent pointer, an int or float for a scalar, the value itself for a constexpr. num_warps,
    num_stages, maxnreg: the launch options. minor: left out by `--quick` and the test suite, where a case
    like it stands for it.
    """

    kernel: Any
    config: str
    args: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    minor: bool = False

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Resources:
    """What a case needs: registers and spilled bytes (local memory) a thread, shared bytes a block."""

    kernel: str
    config: str
    registers: int
    spills: int
    shared: int
    warps: int = field(default=4)


def kernel_modules(package: str = "ssm_modal.kernels") -> list[str]:
    """Names of all modules under `package` whose last part starts with `triton_`."""
    root = importlib.import_module(package)
    found = pkgutil.walk_packages(root.__path__, package + ".")
    return sorted(info.name for info in found if info.name.rpartition(".")[2].startswith("triton_"))


def collect(modules: Iterable[str] | None = None) -> list[AotCase]:
    """The cases of `modules`, by default of every kernel module."""
    cases: list[AotCase] = []
    for name in kernel_modules() if modules is None else modules:
        module = importlib.import_module(name)
        if hasattr(module, "aot_cases"):
            cases.extend(module.aot_cases())
    return cases


def _specialise(value: Any, specialize: bool, align: bool, where: str) -> tuple[str, Any, list[Any]]:
    """Triton type, constant (for type "constexpr") and attributes of one run-time argument."""
    if value is None:
        return "constexpr", None, []
    if isinstance(value, str):
        if not value.startswith("*"):
            raise ValueError(f"{where} is {value!r}, expected a pointer type such as '*fp32'")
        return value, None, [["tt.divisibility", 16]]
    if isinstance(value, bool):
        return "i1", None, []
    if isinstance(value, int):
        if specialize and value == 1:
            return "constexpr", 1, []
        width = "i32" if -(2**31) <= value < 2**31 else "i64"
        return width, None, [["tt.divisibility", 16]] if specialize and align and value % 16 == 0 else []
    if isinstance(value, float):
        return "fp32", None, []
    raise TypeError(
        f"{where} has type {type(value).__name__}, expected a pointer type, None, bool, int or float"
    )


def compile_case(case: AotCase, capability: int = 90) -> Any:
    """Compile `case` for an NVIDIA GPU of `capability` (90 for 9.0); returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(case.kernel, JITFunction):
        raise RuntimeError(
            f"{case.name} was defined under TRITON_INTERPRET=1 and cannot be compiled; "
            "unset it in a new process"
        )
    names = [p.name for p in case.kernel.params]
    if set(case.args) != set(names):
        missing, unknown = sorted(set(names) - set(case.args)), sorted(set(case.args) - set(names))
        raise ValueError(f"{case.name} [{case.config}]: arguments missing {missing}, unknown {unknown}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for index, param in enumerate(case.kernel.params):
        value = case.args[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        kind, constant, attrs = _specialise(
            value,
            not param.do_not_specialize,
            not param.do_not_specialize_on_alignment,
            f"{case.name} [{case.config}]: {param.name}",
        )
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = constant
        if attrs:
            attributes[(index,)] = attrs
    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    source = ASTSource(case.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(case: AotCase, capability: int = 90) -> Resources:
    """Compile `case` and read what it needs with the cuobjdump that Triton ships."""
    from triton import knobs

    compiled = compile_case(case, capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        dump = subprocess.run(command, capture_output=True, text=True, check=True)
    match = _RESOURCES.search(dump.stdout + dump.stderr)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resource usage for {case.name}: {dump.stdout}{dump.stderr}")
    registers, stack, _, local = (int(n) for n in match.groups())
    # The compiled kernel asks for its shared memory at launch, so the binary itself shows none of it.
    shared = int(compiled.metadata.shared)
    return Resources(case.name, case.config, registers, stack + local, shared, case.num_warps)


def measure(cases: Iterable[AotCase], capability: int = 90, jobs: int = 1) -> list[Resources]:
    """`resources` of all cases, `jobs` at a time, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda case: resources(case, capability), cases))


def table(rows: Iterable[Resources]) -> str:
    """The rows as an aligned table, one line a case."""
    lines = [("kernel", "config", "warps", "registers", "spills", "shared")]
    lines += [
        (r.kernel, r.config, str(r.warps), str(r.registers), str(r.spills), str(r.shared)) for r in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table of all shipped configurations; exit status 1 where one of them spills."""
    parser = argparse.ArgumentParser(prog="python -m ssm_modal.kernels.aot", description=main.__doc__)
    parser.add_argument("--capability", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--only", default="", help="only modules with this in their name")
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="compilations at a time"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the minor cases")
    args = parser.parse_args(argv)
    modules = [name for name in kernel_modules() if args.only in name]
    cases = [case for case in collect(modules) if not (args.quick and case.minor)]
    rows = measure(cases, args.capability, args.jobs)
    print(table(rows))
    spilling = [r for r in rows if r.spills]
    if spilling:
        print(f"{len(spilling)} of {len(rows)} configurations spill", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
