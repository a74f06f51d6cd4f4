"""The benchmarks: no figure without a passed check, ratios and bars, tables and files; every case, tiny."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as program
from benchmarks import accuracy, bench_conv, bench_scan, harness, peers, plots, timing
from benchmarks.directions import two_directions, unequal_lengths
from benchmarks.harness import Bar, Case, Check, Figure, Options, Report, Unavailable, chosen, run
from benchmarks.inputs import GRADIENTS, reference_gradients, reference_output, scan_inputs
from benchmarks.output import read_figures, report_lines, rows, summary_lines, write_checks, write_figures
from benchmarks.reference import run_scan, scan_reference, spread, train_scan
from benchmarks.timing import Candidate, bytes_of, in_turn, measure
from ssm_modal.kernels.scan import selective_scan
from ssm_modal.kernels.sequences import Sequences

CPU = torch.device("cpu")
for module in program.MODULES:
    importlib.import_module(f"benchmarks.{module}")
TINY = Options(repeats=2, slow_repeats=2, device=CPU, tiny=True, quick=True)


def report(error: float = 1e-6, peer: float = 4.0, length: int | None = None) -> Report:
    return Report(
        "made_up",
        "B1",
        "ours",
        checks=[Check("output", error, 1e-5)],
        figures=[
            Figure("forward", "ours", (0.2, 0.1, 9.0)),
            Figure("forward", "peer", (peer,)),
            Figure("peak of forward", "ours", (2.5,), "GiB"),
        ],
        bars=(Bar("forward", 1 / 30, "peer"), Bar("peak of forward", 2.4)),
        length=length,
    )


def test_figures_ratios_and_bars() -> None:
    r = report(peer=8.0)
    forward, peak = r.bars
    assert r.ratio("forward", "peer") == pytest.approx(40.0)
    assert math.isnan(r.ratio("forward", "nobody"))
    assert r.limit(forward) == pytest.approx(8.0 / 30)
    assert r.met(forward) is True
    assert r.met(peak) is False
    assert report(peer=4.0).met(forward) is False
    assert r.met(Bar("forward", 1.0, "nobody")) is None
    assert r.met(Bar("backward", 1.0)) is None
    assert Figure("x", "y", (4.0, 1.0, 3.0, 2.0)).quartiles == (1.75, 3.25)
    assert Figure("x", "y", (4.0, 1.0)).quartiles == (1.0, 4.0)


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_nothing_is_shown_or_written_behind_a_failed_check(error: float, tmp_path: Path) -> None:
    right, wrong = "\n".join(report_lines(report())), "\n".join(report_lines(report(error)))
    assert "0.2000 ms" in right
    assert "0.1333 MISSED (0.0333 of peer)" in right
    assert "2.400 MISSED" in right
    assert "WRONG" in wrong
    assert "no figures" in wrong
    for shown in ("ms", "GiB", "0.2", "20.00"):
        assert shown not in wrong
    both = [report(), report(error)]
    assert [(r.what, r.who) for r in rows(both)] == [(f.what, f.who) for f in report().figures]
    outcome = harness.Outcome(both)
    assert len(list(outcome.bars())) == 2
    assert "WRONG: made_up (B1)" in list(summary_lines(outcome))
    assert outcome.code(require_bars=False) == 1
    assert plots.draw(rows([report(error)]), tmp_path) == []
    write_checks(tmp_path / "checks.csv", both)
    assert [line.split(",")[-1] for line in (tmp_path / "checks.csv").read_text().split()] == [
        "passed",
        "True",
        "False",
    ]


def test_figures_survive_the_file(tmp_path: Path) -> None:
    found = list(rows([report(), report(length=64)]))
    write_figures(tmp_path / "figures.csv", found)
    again = read_figures(tmp_path / "figures.csv")
    assert again == found
    assert (again[0].median, again[0].met, again[0].times_ours) == (0.2, False, 1.0)
    assert again[1].times_ours == pytest.approx(20.0)
    assert again[2].at_most == 2.4
    assert (again[2].length, again[3].length) == (None, 64)
    assert "torch" in (tmp_path / "figures.csv").read_text().split("\n")[0]


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    def refuses(options: Options) -> Report:
        raise Unavailable("no such machine")

    def breaks(options: Options) -> Report:
        raise RuntimeError("device-side assertion")

    functions: dict[str, Callable[[Options], Report]] = {
        "scan_right": lambda o: report(peer=8.0),
        "scan_slow": lambda o: report(peer=4.0),
        "conv_wrong": lambda o: report(1e-4),
        "absent": refuses,
        "broken": breaks,
    }
    made = {name: Case(name, f, "cpu", name == "absent", 5.0) for name, f in functions.items()}
    monkeypatch.setattr(harness, "CASES", made)
    return made


def test_a_run_goes_on_past_broken_cases_and_says_how_it_ended(cases: dict[str, Case]) -> None:
    shown: list[Report] = []
    outcome = run(list(cases), Options(), None, shown.append)
    assert shown == outcome.reports
    assert [r.correct for r in shown] == [True, True, False]
    assert outcome.skipped == {"absent": "no such machine"}
    assert outcome.broken == {"broken": "RuntimeError: device-side assertion"}
    assert outcome.code(False) == 1
    fine = run(["scan_right", "absent"], Options())
    assert (fine.code(False), fine.code(True)) == (0, 2)  # the peak's bar is missed
    fine.reports[0].bars = fine.reports[0].bars[:1]
    assert fine.code(True) == 0


def test_a_spent_budget_leaves_cases_out(cases: dict[str, Case]) -> None:
    outcome = run(["scan_right"], Options(), budget=4.0)
    assert outcome.reports == []
    assert "4 seconds are spent; --only scan_right" in outcome.skipped["scan_right"]
    assert run(["scan_right"], Options(), budget=60.0).reports


def test_choosing_cases(cases: dict[str, Case]) -> None:
    assert chosen("scan") == ["scan_right", "scan_slow"]
    assert chosen("absent,scan_s,scan") == ["absent", "scan_slow", "scan_right"]
    assert chosen(None) == list(cases)
    assert chosen(None, quick=True) == ["absent"]
    cases["broken"] = dataclasses.replace(cases["broken"], whole=False)
    assert chosen(None) == ["scan_right", "scan_slow", "conv_wrong", "absent"]
    assert chosen("broken") == ["broken"]
    cases["scan"] = cases["absent"]
    assert chosen("scan") == ["scan"]
    with pytest.raises(ValueError, match="'norm' picks no case; there are scan_right, "):
        chosen("scan,norm")


def candidate(name: str, error: float = 0.0, calls: list[str] | None = None) -> Candidate:
    def go() -> str:
        if calls is not None:
            calls.append(name)
        return name

    return Candidate(name, go, lambda _: [Check("out", error, 1e-3)])


def test_measuring_takes_turns_and_leaves_out_what_is_wrong() -> None:
    def fails() -> None:
        raise ImportError("built for another torch\nand more")

    calls: list[str] = []
    r = Report("x", "B1", "ours")
    others = [candidate("peer", 4e-3, calls), candidate("bad", 6e-3, calls), Candidate("old", fails)]
    measure(r, "forward", [candidate("ours", 0.0, calls), *others], TINY, CPU)
    assert calls == ["ours", "peer", "bad", "ours", "peer", "ours", "peer"]
    assert [(f.who, len(f.samples)) for f in r.figures] == [("ours", 2), ("peer", 2)]
    assert [c.name for c in r.checks] == ["out"]
    assert r.notes == [
        "forward: bad left out, its out is off by 6.0e-03",
        "forward: old left out, ImportError: built for another torch",
    ]


def test_measuring_stops_at_a_failed_check_of_ours() -> None:
    calls: list[str] = []
    r = Report("x", "B1", "ours")
    measure(r, "forward", [candidate("ours", 2e-3, calls), candidate("peer", 0.0, calls)], TINY, CPU)
    measure(r, "backward", [candidate("ours", 0.0, calls)], TINY, CPU)
    assert calls == ["ours"]
    assert not r.correct
    assert r.figures == []


def test_measuring_without_enough_memory() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("tried to allocate 64.00 GiB")

    r = Report("x", "B1", "ours")
    measure(r, "forward", [candidate("ours"), Candidate("peer", too_large)], TINY, CPU)
    assert [f.who for f in r.figures] == ["ours"]
    assert r.notes == ["forward: peer runs out of memory"]


def test_what_ours_raises_is_not_swallowed() -> None:
    def broken() -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        measure(Report("x", "B1", "ours"), "forward", [Candidate("ours", broken)], TINY, CPU)


def test_rounds_end_with_their_time() -> None:
    class Fixed:
        def sample(self) -> float:
            return 0.5

    samplers: dict[str, timing.Sampler] = {"a": Fixed(), "b": Fixed()}
    assert in_turn(samplers, {"a": 3, "b": 1}, 60.0) == {"a": (0.5, 0.5, 0.5), "b": (0.5,)}
    assert in_turn(samplers, {"a": 3, "b": 3}, -1.0) == {"a": (0.5,), "b": (0.5,)}


def test_memory_counts_a_storage_once() -> None:
    x = torch.zeros(4, 8)
    assert bytes_of([x, x[1:], x.transpose(0, 1), torch.zeros(3)]) == 4 * 8 * 4 + 12


def test_the_references_of_the_benchmarks_agree_with_the_op() -> None:
    x = scan_inputs(2, 12, 20, 4, device="cpu", dtype=torch.float64)
    u, delta, A, B, C, D, z, bias = leaves = x.leaves()
    A, D, bias = (t.double() for t in (A, D, bias))
    out = selective_scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True, backend="torch")
    torch.testing.assert_close(reference_output(x, slab=5), out.detach())
    for name, a, b in zip(
        GRADIENTS, torch.autograd.grad(out, leaves, x.dout), reference_gradients(x, slab=5)
    ):
        torch.testing.assert_close(a, b.to(a.dtype), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["forward", "reverse", "packed"])
def test_slices_find_a_wrong_value(mode: str) -> None:
    """What `scan_reference` checks is right for the op; each of the nine results, once spoilt, is seen."""
    x = scan_inputs(2 if mode != "packed" else 1, 12, 150, 4, device="cpu", dtype=torch.float32)
    reverse = mode == "reverse"
    seqs = Sequences.from_lengths((70, 5, 75)) if mode == "packed" else None
    reference = scan_reference(x, reverse=reverse, seqs=seqs)
    found = train_scan(x.leaves(), x.dout, lambda g: run_scan(g, reverse=reverse, cu_seqlens=seqs))
    checks = reference.checks(found)
    names = [check.name for check in checks]
    assert sorted(names) == sorted(["out", *GRADIENTS])
    assert all(check.passed for check in checks), checks
    channel, last = int(reference.channels[-1]), 150 - 1
    # dB is checked where the scan ends, dC where it begins.
    at = {"dA": (channel,), "dD": (channel,), "ddelta_bias": (channel,)}
    at |= {"dB": (0, 0 if reverse else last), "dC": (0, last if reverse else 0)}
    for i, name in enumerate(("out", *GRADIENTS)):
        spoilt = [t.clone() for t in found]
        spoilt[i][at.get(name, (0, last, channel))] += 1.0
        wrong = [check.name for check in reference.checks(spoilt) if not check.passed]
        assert wrong == [name]
    assert [c.name for c in reference.checks(found[0])] == ["out"]


def test_channels_of_a_slice() -> None:
    assert spread(5, 8, CPU).tolist() == [0, 1, 2, 3, 4]
    assert spread(2048, 8, CPU).tolist()[::7] == [0, 2047]
    assert len(set(spread(1 << 20, 8, CPU).tolist())) == 8


def test_accuracy_sees_a_small_pair_beside_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative error of 1e-3 in the smallest outputs is lost in the whole's norm but not in the pair's."""
    problem = accuracy.pairs(1, 40, 2, 1, torch.float32, CPU, 4)
    sizes = [float(run_scan(problem.x.given)[..., problem.channels(i)].norm()) for i in range(24)]
    smallest = min(range(24), key=sizes.__getitem__)
    assert all(check.passed for check in accuracy.checks(problem, TINY))

    def off(given: tuple[Tensor, ...], backend: str | None) -> Tensor:
        out = run_scan(given, backend=backend)
        if out.dtype == torch.float64:
            return out
        scale = torch.ones(out.shape[2])
        scale[problem.channels(smallest)] += 1e-3
        return out * scale

    monkeypatch.setattr(accuracy, "run_scan", off)
    wrong = [check for check in accuracy.checks(problem, TINY) if not check.passed]
    step, rate = problem.labels[smallest]
    assert f"out at dt {step:g}, A {'mixed' if rate is None else f'{rate:g}'}" in [c.name for c in wrong]


def test_accuracy_spans_what_is_asked_for() -> None:
    problem = accuracy.pairs(1, 8, 2, 4, torch.float32, CPU)
    x = problem.x
    assert (float(x.A.max()), float(x.A.min())) == (pytest.approx(-1e-3), pytest.approx(-64.0))
    dt = torch.nn.functional.softplus(x.delta_bias.double())
    assert (float(dt.min()), float(dt.max())) == (pytest.approx(1e-4, rel=1e-3), pytest.approx(10.0))
    assert x.B.shape == (1, 8, 4, 16)
    assert x.u.shape[2] == x.A.shape[0] == 48


def test_both_directions_are_the_same_with_and_without_flips() -> None:
    x = scan_inputs(2, 6, 11, 3, device="cpu", dtype=torch.float64)
    given = (*x.given, x.delta.roll(1, 2), 2 * x.A, x.B.flip(2), x.C.flip(2), x.D + 1, x.delta_bias - 1)
    given = tuple(t.double() for t in given)
    torch.testing.assert_close(two_directions(given, "torch"), two_directions(given, "torch", flips=True))


def test_unequal_lengths() -> None:
    lengths = unequal_lengths(131072, 64)
    assert (len(lengths), sum(lengths)) == (64, 131072)
    assert min(lengths) >= 1
    assert max(lengths) > 4 * min(lengths)
    assert unequal_lengths(64, 64) == (1,) * 64


INSTALLED = {name for name in ("transformers", "mambapy") if importlib.util.find_spec(name)}


@pytest.mark.parametrize("name", list(harness.CASES))
def test_every_case_runs_tiny_on_the_cpu(name: str) -> None:
    """It is right, gives figures (or checks alone), and the peers that are installed compute the same."""
    outcome = run([name], TINY)
    assert outcome.broken == {}
    assert outcome.skipped == {}
    assert outcome.reports
    for found in outcome.reports:
        assert found.correct, [c for c in found.checks if not c.passed]
        assert found.checks
        assert found.bars == ()
        assert found.figures or name in ("accuracy", "memory")
        for note in found.notes:
            left_out = [peer for peer in INSTALLED if f"{peer} left out" in note or "runs out" in note]
            assert not left_out, note
            assert "off by" not in note, note


class Recording(Options):
    """Options that note the bars and ask for none."""

    kept: ClassVar[list[Bar]]

    def bars(self, *bars: Bar) -> tuple[Bar, ...]:
        self.kept.extend(bars)
        return ()


def test_every_case_bars_what_it_measures() -> None:
    """A bar names a figure that its case makes, so that none is silently untold."""
    fields = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    asked = 0
    for name in ("scan_b8_l2048", "reverse", "packed", "bidirectional", "conv", "host", "block_b8_l8192"):
        bars: list[Bar] = []
        Recording.kept = bars
        (found,) = run([name], Recording(**fields)).reports
        made = {f.what for f in found.figures} | {timing.peak_of(f.what) for f in found.figures}
        asked += len(bars)
        assert {bar.what for bar in bars} <= made
        assert {bar.beside for bar in bars} - {None} <= {f.who for f in found.figures}
    assert asked == 3 + 2 + 2 + 2 + 2 + 3 + 2


def test_the_program_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--only",
        "lengths_scan,norm",
        "--device",
        "cpu",
        "--tiny",
        "--repeats",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert program.main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "figures.csv",
        "checks.csv",
        "lengths_scan.png",
        "ratios.png",
    }
    found = read_figures(tmp_path / "figures.csv")
    assert [row.length for row in found if row.case == "lengths_scan" and row.ours] == [8, 16, 32]
    printed = capsys.readouterr().out
    assert "tiny sizes: the figures mean nothing" in printed
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert plots.main([str(tmp_path)]) == 0
    assert (tmp_path / "lengths_scan.png").stat().st_size > 10_000


def test_a_gpu_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--only", "scan_b8_l2048", "--device", "cpu"]) == 0
    assert "scan_b8_l2048: skipped, it is for an NVIDIA GPU, and the device" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert program.main(["--only", "scan_b8_l2048"]) == 0
        assert "scan_b8_l2048: skipped, it needs an NVIDIA GPU" in capsys.readouterr().out


def test_arguments_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "cpu_scan_forward     Selective scan forward, B1 D1536" in listed
    for wrong, said in (
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--only", "nothing"], "'nothing' picks no case"),
        (["--device", "abacus"], "abacus"),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(wrong)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_a_missing_peer_is_named_with_what_mends_it() -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        with pytest.raises(Unavailable, match=r"mamba_ssm is not installed \(MAMBA_KEEP_CUDA_BUILD"):
            peers.peer("mamba_ssm.modules.mamba_simple", "Mamba")
    with pytest.raises(Unavailable, match=r"torch's torch\.nn has no Mamba"):
        peers.peer("torch.nn", "Mamba")
    notes: list[str] = []

    def none() -> None:
        raise Unavailable("it is elsewhere")

    assert peers.offer(notes, "peer", none) == []
    assert notes == ["peer left out: it is elsewhere"]


def test_weights_without_a_counterpart_are_refused() -> None:
    with pytest.raises(Unavailable, match=r"its parameter weight \(3, 2\) has no counterpart"):
        peers.load_block(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))


@dataclasses.dataclass(frozen=True)
class MadeUpLaunch:
    serial: bool = False
    block: int = 32
    registers: int | None = None
    warps: int = 1


def test_launches_to_sweep() -> None:
    shipped = MadeUpLaunch()
    assert bench_scan.parse_sweep(["block=16,64", "registers=None,96", "serial=True"], shipped) == {
        "block": [16, 64],
        "registers": [None, 96],
        "serial": [True],
    }
    for word, said in (
        ("warp=1", "it has serial, block, registers, warps"),
        ("block=a", "block=V,V"),
        ("block", "V,V"),
    ):
        with pytest.raises(ValueError, match=said):
            bench_scan.parse_sweep([word], shipped)
    alone = dict(bench_scan.variants(shipped, {}))
    assert list(alone) == ["serial=True", "block=16", "block=64", "warps=2"]
    assert alone["block=64"] == MadeUpLaunch(block=64)
    given = dict(bench_scan.variants(shipped, {"block": [16, 32], "warps": [1, 2]}))
    assert list(given) == ["block=16 warps=1", "block=16 warps=2", "block=32 warps=2"]


def test_launches_are_checked_and_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels replaced by the torch form: the shipped launch, a right one and a wrong one."""

    def form(x: harness.Any, launch: MadeUpLaunch) -> tuple[Tensor, ...]:
        out, *grads = train_scan(x.leaves(), x.dout, run_scan)
        return out, *grads[:7], grads[7] * (1.5 if launch.warps == 2 else 1.0)

    monkeypatch.setattr(bench_scan, "launch_of", lambda x: MadeUpLaunch())
    monkeypatch.setattr(bench_scan, "training", form)
    monkeypatch.setattr(bench_scan, "forward", lambda x, launch: run_scan(x.given))
    found = bench_scan.compare((8, 64, 64, 16), ["block=16", "warps=1,2"], TINY)
    assert found.correct
    assert {f.who for f in found.figures} == {"shipped", "block=16 warps=1"}
    assert [note for note in found.notes if "block=16 warps=2 left out, its ddelta_bias is off" in note]


def test_the_kernels_alone_give_what_the_reference_gives() -> None:
    """The calls of bench_scan fit the kernels' signatures (in Triton's interpreter where there is no GPU)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = scan_inputs(1, 4, 6, 2, device=device, dtype=torch.float32)
    checks = scan_reference(x).checks(bench_scan.training(x, bench_scan.launch_of(x)))
    assert len(checks) == 9
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("only_forward", [False, True])
def test_launches_of_the_convolution_are_checked_and_timed(only_forward: bool) -> None:
    """In Triton's interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = bench_conv.compare(["unroll=2"], dataclasses.replace(TINY, device=device), only_forward)
    assert found.correct
    assert {f.who for f in found.figures} == {"shipped", "unroll=2"}


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["events", "graph", "wall"])
def test_times_on_a_gpu(how: timing.How) -> None:
    """A call that reads and writes a gigabyte takes between 0.1 and 100 ms, however it is timed."""
    device = torch.device("cuda")
    x = torch.zeros(1 << 28, device=device)
    options = dataclasses.replace(TINY, repeats=3, device=device)
    r = Report("x", "B1", "ours")
    ours = Candidate("ours", lambda: x.add_(1.0), holds=lambda: (x,))
    measure(r, "add", [ours, dataclasses.replace(ours, name="peer")], options, device, how=how)
    for figure in r.figures:
        assert 0.1 < figure.median < 100
    assert 0.5 < r.ratio("add", "peer") < 2.0


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    """Inputs, results and what stood between them; not what others hold."""
    device = torch.device("cuda")
    other, x = torch.zeros(1 << 26, device=device), torch.zeros(1 << 26, device=device)

    def go() -> Tensor:
        between = x + 1
        return between * 2

    peak = timing.peak_gib(Candidate("ours", go, holds=lambda: (x,)), device)
    assert peak == pytest.approx(3 * x.numel() * 4 / timing.GIB)
    assert other.numel() == x.numel()


def test_published_models_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import published

    pytest.importorskip("bitsandbytes")
    assert published.main(["--tiny", "--device", "cpu", "--only", "falcon,falcon_int4,jamba_int8"]) == 0
    table = capsys.readouterr().out.split(published.HEAD)[1].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[:3] for row in cells] == [
        *(["falcon", "1", "40"],) * 3,
        *(["falcon_int4", "1", "40"],) * 2,
        ["jamba_int8", "1", "40"],
    ]
    assert all(float(row[3].replace(",", "")) > 0 and float(row[4].split()[0]) > 0 for row in cells)
    with pytest.raises(SystemExit):
        published.main(["--only", "falcn"])


def test_published_models_have_the_weights_of_a_start() -> None:
    from benchmarks import published

    model = published.build(published.ENTRIES["mamba_2_8b"], CPU, tiny=True)
    mixer = model.backbone.layers[0].mixer
    fresh = published.model_config("mamba_2_8b", d_model=64, n_layers=2, vocab_size=128).build()
    assert torch.equal(mixer.A_log, fresh.backbone.layers[0].mixer.A_log)
    dt = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert 1e-3 <= float(dt.min()) < float(dt.max()) <= 0.101
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert float(mixer.in_proj.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
