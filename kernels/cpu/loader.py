"""Compiles the C kernels at first use, keeps the library in a cache folder, and says why where that fails.

Nothing needs a compiler at installation. The first call looks for a library built from the same sources, by
the same compiler, for the same CPU, and builds it where there is none (seconds, once a machine). Environment:

- `SSM_MODAL_NO_CPU_KERNELS=1` switches the compiled kernels off.
- `CC` names the compiler (default: the first of cc, gcc, clang on the path).
- `SSM_MODAL_CACHE` names the cache folder (default: `$XDG_CACHE_HOME/ssm_modal`, else `~/.cache/ssm_modal`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = ("parallel.c", "selective_scan.c", "causal_conv1d.c")
HEADERS = ("vec.h", "parallel.h", "selective_scan.h", "causal_conv1d.h")
# Contracted multiply-adds are wanted; what would break NaN and infinity (-ffast-math) is not.
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
)
# Some compilers for ARM know only -mcpu=native; a few know neither.
NATIVE = (("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 300

# A built library ends with this mark and the SHA-256 of all before it, so that a file cut short or altered is
# seen before it is mapped (the loader reads past the end of a short one and dies).
_MARK = b"ssm_modal library\n"

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failure: str | None = None


class CompileError(RuntimeError):
    """The C kernels could not be built or loaded; the text says why."""


def why_unavailable() -> str | None:
    """Why the compiled kernels cannot be used, or None where they can.

    The first call of a process loads the library, building it where the cache has none; its failure is
    remembered and warned about once.
    """
    if _library is not None and not _disabled():
        return None
    try:
        library()
    except CompileError as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The loaded library; raises CompileError where there is none to be had."""
    global _library, _failure
    if _disabled():
        raise CompileError("the compiled CPU kernels are switched off (SSM_MODAL_NO_CPU_KERNELS is set)")
    if _library is not None:
        return _library
    with _lock:
        if _library is not None:
            return _library
        if _failure is not None:
            raise CompileError(_failure)
        try:
            _library = _load()
        except (CompileError, OSError) as error:
            _failure = str(error)
            warnings.warn(f"ssm_modal: no compiled CPU kernels, slower ones serve: {_failure}", stacklevel=3)
            raise CompileError(_failure) from error
    return _library


def _disabled() -> bool:
    return os.environ.get("SSM_MODAL_NO_CPU_KERNELS", "0").lower() in ("1", "true", "on", "yes")


def cache_folder() -> Path:
    """Where built libraries are kept."""
    named = os.environ.get("SSM_MODAL_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ssm_modal"


def _load() -> ctypes.CDLL:
    if sys.platform == "win32":
        raise CompileError("the compiled CPU kernels are built on Linux and macOS only")
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        raise CompileError("the compiled CPU kernels need a 64-bit machine")
    compiler = _compiler()
    name = f"kernels-{_key(compiler)}.so"
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if not _sound(path):
            with _file_lock(folder / f"{name}.lock"):
                if not _sound(path):  # another process may have built it meanwhile
                    _build(compiler, path)
        return _open(path)
    except OSError as error:
        # The folder cannot be written, or not be run from (noexec): build for this process alone.
        with tempfile.TemporaryDirectory(prefix="ssm_modal-") as private:
            path = Path(private) / name
            _build(compiler, path)
            try:
                return _open(path)  # stays mapped when its file is removed
            except OSError as again:
                raise CompileError(
                    f"the built library loads neither from the cache ({error}) nor from {private} ({again}); "
                    "set SSM_MODAL_CACHE to a folder that can be written and run from"
                ) from again


def _compiler() -> tuple[str, ...]:
    named = os.environ.get("CC")
    if named:
        words = shlex.split(named)
        found = shutil.which(words[0]) if words else None
        if found is None:
            raise CompileError(f"CC is {named!r}, which is not a program on the path")
        return (found, *words[1:])
    for candidate in ("cc", "gcc", "clang"):
        found = shutil.which(candidate)
        if found is not None:
            return (found,)
    raise CompileError("no C compiler found (cc, gcc or clang); install one, e.g. apt install gcc, or set CC")


def _run(command: list[str], timeout: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"the C compiler {command[0]} did not run: {error}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        text = " | ".join(said[:4]) or "no message"
        raise CompileError(f"the C compiler {command[0]} failed with status {done.returncode}: {text}")
    return done.stdout


def _key(compiler: tuple[str, ...]) -> str:
    """Hash of all that the built library depends on."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in (*SOURCES, *HEADERS):
        digest.update(file.encode() + b"\0" + (here / file).read_bytes() + b"\0")
    version = _run([*compiler, "--version"], 60)
    for part in (*FLAGS, *compiler, version, platform.system(), platform.machine(), _cpu_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _cpu_features() -> str:
    """What this CPU can do: a home folder is often shared by machines that differ."""
    try:
        with open("/proc/cpuinfo") as file:
            wanted = ("flags", "Features", "model name", "CPU part", "isa")
            lines = {line.strip() for line in file if line.split(":")[0].strip() in wanted}
            return "\n".join(sorted(lines))
    except OSError:
        return platform.processor()


def _sound(path: Path) -> bool:
    """Whether `path` is a whole built library."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return False
    body, mark, digest = data[: -len(_MARK) - 32], data[-len(_MARK) - 32 : -32], data[-32:]
    return mark == _MARK and hashlib.sha256(body).digest() == digest


def _build(compiler: tuple[str, ...], path: Path) -> None:
    """Compile to a temporary name beside `path` and rename: `path` is absent or whole, never half-written."""
    here = Path(__file__).parent
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        first: CompileError | None = None
        for native in NATIVE:
            command = [*compiler, *FLAGS, *native, *(str(here / s) for s in SOURCES), "-o", temporary]
            try:
                _run(command, COMPILE_SECONDS)
                break
            except CompileError as error:
                first = first or error
        else:
            assert first is not None
            raise first
        with open(temporary, "r+b") as file:
            body = file.read()
            file.write(_MARK + hashlib.sha256(body).digest())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases it


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    opened.ssm_set_parallel.argtypes = [ctypes.c_void_p]
    opened.ssm_set_parallel.restype = None
    opened.ssm_set_parallel(_openmp_entry())
    # OpenMP's threads do not survive a fork, and its next parallel region would wait for them for ever.
    os.register_at_fork(after_in_child=functools.partial(opened.ssm_set_parallel, None))
    return opened


def _openmp_entry() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded, or None.

    With None the kernels start threads of their own.
    """
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except OSError:
        return None
    named = [p for p in paths if os.path.basename(p).startswith(("libgomp", "libiomp5", "libomp"))]
    # Another package may have brought a second one: torch's own lies beside torch.
    for path in sorted(named, key=lambda p: ("torch" not in p, p)):
        try:
            openmp = ctypes.CDLL(path, mode=ctypes.DEFAULT_MODE | os.RTLD_NOLOAD)
            return ctypes.cast(openmp.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
