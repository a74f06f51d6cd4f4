"""The lazy compiler of the C kernels: its cache, its failures, and what the dispatcher makes of them."""

from __future__ import annotations

import multiprocessing
import stat
import warnings
from pathlib import Path

import pytest
import torch

from ssm_modal.kernels.cpu import loader
from ssm_modal.kernels.dispatch import BackendError, explain
from ssm_modal.kernels.scan import selective_scan


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A loader that has loaded nothing, with an empty cache folder and quick compiles; the folder."""
    monkeypatch.setattr(loader, "_library", None)
    monkeypatch.setattr(loader, "_failure", None)
    monkeypatch.setattr(loader, "FLAGS", tuple("-O0" if f == "-O3" else f for f in loader.FLAGS))
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSM_MODAL_NO_CPU_KERNELS", raising=False)
    monkeypatch.delenv("SSM_MODAL_BACKEND", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CC is a wrapper that writes a line for every compile into the file returned."""
    log, script = tmp_path / "compiles", tmp_path / "counting-cc"
    real = loader._compiler()[0]
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo once >> {log} ;; esac\nexec {real} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(script))
    log.touch()
    return log


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_library", None)
    monkeypatch.setattr(loader, "_failure", None)


def built(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def test_builds_once_and_then_reads_the_cache(
    fresh: Path, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loader.why_unavailable() is None
    assert loader.why_unavailable() is None
    forget(monkeypatch)
    assert loader.why_unavailable() is None
    assert counted.read_text().split() == ["once"]
    assert len(built(fresh)) == 1
    assert not list(fresh.glob("*.tmp"))


def test_another_compiler_or_source_has_another_key(
    fresh: Path, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = loader._compiler()
    key = loader._key(mine)
    assert loader._key(mine) == key
    assert loader._key((*mine, "-g")) != key
    monkeypatch.setattr(loader, "FLAGS", (*loader.FLAGS, "-DNOTHING"))
    assert loader._key(mine) != key


def in_a_child(path: str) -> None:
    assert loader.why_unavailable() is None
    torch.set_num_threads(1)
    x = torch.ones(1, 3, 2)
    out = selective_scan(x, x, -torch.ones(2, 1), torch.ones(1, 3, 1), torch.ones(1, 3, 1), backend="cpu")
    Path(path).write_text(repr(out.flatten().tolist()))


def test_processes_that_compile_at_once_compile_once(fresh: Path, counted: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = [tmp_path / f"result{i}" for i in range(3)]
    children = [context.Process(target=in_a_child, args=(str(r),)) for r in results]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert counted.read_text().split() == ["once"]
    assert len(built(fresh)) == 1
    decay = float(torch.exp(torch.tensor(-1.0)))
    for result in results:
        values = torch.tensor(eval(result.read_text()))
        expected = torch.tensor([1.0, 1.0 + decay, 1.0 + decay + decay**2]).repeat_interleave(2)
        torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("damage", ["cut short", "altered", "empty"])
def test_a_damaged_file_is_built_again(
    fresh: Path, counted: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    compiler = loader._compiler()
    path = fresh / f"kernels-{loader._key(compiler)}.so"
    fresh.mkdir()
    loader._build(compiler, path)
    whole = path.read_bytes()
    assert loader._sound(path)
    if damage == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "altered":
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    else:
        path.write_bytes(b"")
    assert not loader._sound(path)
    assert loader.why_unavailable() is None
    assert loader._sound(path)
    assert counted.read_text().split() == ["once", "once"]


def test_a_failing_compiler_is_named_once_and_torch_serves(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    x = torch.ones(1, 4, 2)
    with pytest.warns(UserWarning, match=r"no compiled CPU kernels, slower ones serve: .*/bin/false failed"):
        choice = explain("selective_scan")
    assert choice.backend == "torch"
    assert "not cpu: the C compiler /bin/false failed with status 1" in choice.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second warning would fail here
        out = selective_scan(x, x, -torch.ones(2, 1), torch.ones(1, 4, 1), torch.ones(1, 4, 1))
        with pytest.raises(BackendError, match=r"backend 'cpu' .*cannot serve: the C compiler /bin/false"):
            selective_scan(x, x, -torch.ones(2, 1), torch.ones(1, 4, 1), torch.ones(1, 4, 1), backend="cpu")
    assert float(out[0, 0, 0]) == 1.0
    assert not list(fresh.glob("*.so")) if fresh.exists() else True


def test_a_compiler_that_breaks_half_way_leaves_nothing(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "breaking-cc"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo 1; exit 0 ;; esac\n'
        'while [ "$1" != "-o" ]; do shift; done\necho half > "$2"\necho "disk is full" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.warns(UserWarning, match="no compiled CPU kernels"):
        reason = loader.why_unavailable()
    assert reason is not None
    assert "status 1: disk is full" in reason
    assert [p.suffix for p in fresh.iterdir()] == [".lock"]


def test_a_missing_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.warns(UserWarning, match="no compiled CPU kernels"):
        assert loader.why_unavailable() == "CC is 'no-such-compiler -O2', which is not a program on the path"
    forget(monkeypatch)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.warns(UserWarning, match="no compiled CPU kernels"):
        reason = loader.why_unavailable()
    assert reason is not None
    assert reason.startswith("no C compiler found (cc, gcc or clang)")


def test_a_cache_that_cannot_be_written_does_not_matter(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SSM_MODAL_CACHE", str(tmp_path / "file" / "cache"))
    assert loader.why_unavailable() is None


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSM_MODAL_BACKEND", raising=False)
    monkeypatch.setenv("SSM_MODAL_NO_CPU_KERNELS", "1")
    choice = explain("causal_conv1d")
    assert choice.backend == "torch"
    assert "switched off (SSM_MODAL_NO_CPU_KERNELS is set)" in choice.reason
    with pytest.raises(BackendError, match="SSM_MODAL_NO_CPU_KERNELS"):
        explain("causal_conv1d", backend="cpu")
    monkeypatch.setenv("SSM_MODAL_NO_CPU_KERNELS", "0")
    assert explain("causal_conv1d").backend == "cpu"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSM_MODAL_CACHE", "/a/b")
    assert loader.cache_folder() == Path("/a/b")
    monkeypatch.delenv("SSM_MODAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert loader.cache_folder() == Path("/x/ssm_modal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert loader.cache_folder() == Path.home() / ".cache" / "ssm_modal"


def test_sources_are_listed_in_full() -> None:
    here = Path(loader.__file__).parent
    assert set(loader.SOURCES) == {p.name for p in here.glob("*.c")}
    assert set(loader.HEADERS) == {p.name for p in here.glob("*.h")}
