"""The import laws of docs/architecture.md, by reading every import statement; and what `import ssm_modal`
loads."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("kernels", "tasks", "datamodules", "configs", "tests", "benchmarks")

# Inside ssm_modal/, each imports only what stands before it (and itself).
ORDER = (
    ("errors", "state"),
    ("io",),
    ("plots",),
    ("tokenizers",),
    ("layers",),
    ("backbone",),
    ("heads",),
    ("models",),
    ("attribution",),
    ("checkpoints",),
    ("generation",),
    ("evaluation",),
    ("genomics",),
    ("cli",),
)
# Written for an extra: nothing imports them unless a user or a config asks for what they hold.
FOR_AN_EXTRA = (
    "ssm_modal.evaluation.harness",
    "ssm_modal.models.vision_mamba",
    "ssm_modal.models.vision.model",
)
CORE = ("torch", "triton", "einops", "safetensors", "huggingface_hub")


def sources() -> list[tuple[Path, str]]:
    """Every source file of the package and the dotted name it imports as, each once (the links are not
    followed)."""
    found = []
    for folder, prefix in (
        ("ssm_modal", "ssm_modal"),
        ("kernels", "ssm_modal.kernels"),
        ("tasks", "ssm_modal.tasks"),
        ("datamodules", "ssm_modal.datamodules"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder)
            if folder == "ssm_modal" and inside.parts[0] in SIBLINGS:
                continue
            parts = [p for p in inside.with_suffix("").parts if p != "__init__"]
            found.append((path, ".".join([prefix, *parts])))
    return found


def imported(path: Path, module: str) -> list[tuple[int, str]]:
    """(line, full dotted name) of everything a file imports, at any depth of the code."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def layer_of(name: str) -> str:
    """The folder of the law a dotted name under ssm_modal belongs to: "kernels", "layers", ... or "" for the
    root."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def rank(layer: str) -> int | None:
    return next((i for i, group in enumerate(ORDER) if layer in group), None)


def wrong(module: str, name: str) -> str | None:
    """Why `module` may not import `name`, or None where it may."""
    top = name.split(".")[0]
    if top in SIBLINGS:
        return f"imports {name}: say ssm_modal.{name}"
    if top != "ssm_modal":
        return None
    here, there = layer_of(module), layer_of(name)
    if here == there:
        return None
    if here == "kernels":
        return f"kernels import nothing of ssm_modal, got {name}"
    if {here, there} == {"tasks", "datamodules"}:
        return f"{here} and {there} never import each other, got {name}"
    if here == "datamodules":
        return (
            None
            if there in ("tokenizers", "io", "plots", "errors", "state")
            else f"datamodules may not import {name}"
        )
    if here == "tasks":
        return None
    if there in ("tasks", "datamodules"):
        return f"{here} comes before {there}, got {name}"
    if there == "kernels" or here == "":
        return None
    if here == "cli" and rank(there) is None:
        return None  # the program reads the package's version and lazy names
    mine, theirs = rank(here), rank(there)
    if mine is None:
        return f"the module {module} has no place in the order of docs/architecture.md"
    if theirs is None or theirs > mine:
        return f"{here} comes before {there or 'the package root'}, got {name}"
    return None


def test_the_arrows_run_one_way() -> None:
    files = sources()
    assert len(files) > 40, "the source files were not found"
    problems = []
    for path, module in files:
        for line, name in imported(path, module):
            reason = wrong(module, name)
            if reason:
                problems.append(f"{path.relative_to(ROOT)}:{line}: {reason}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "name", "allowed"),
    [
        ("ssm_modal.layers.mamba", "ssm_modal.kernels.scan.selective_scan", True),
        ("ssm_modal.layers.mamba", "ssm_modal.models.CausalLM", False),
        ("ssm_modal.models.base", "ssm_modal.checkpoints.load_pretrained", False),
        ("ssm_modal.kernels.scan.op", "ssm_modal.errors.ConfigError", False),
        ("ssm_modal.kernels.scan.op", "ssm_modal.kernels.checks", True),
        ("ssm_modal.tasks.base", "ssm_modal.datamodules.text", False),
        ("ssm_modal.datamodules.text", "ssm_modal.tasks.base", False),
        ("ssm_modal.datamodules.text", "ssm_modal.models", False),
        ("ssm_modal.datamodules.text", "ssm_modal.tokenizers.text", True),
        ("ssm_modal.cli.main", "ssm_modal.tasks.language", False),
        ("ssm_modal.layers.mamba", "kernels.scan", False),
        ("ssm_modal.layers.mamba", "torch.nn", True),
        ("ssm_modal.errors", "ssm_modal.state.State", True),
        ("ssm_modal.somewhere.new", "ssm_modal.layers", False),
    ],
)
def test_the_law_tells_right_from_wrong(module: str, name: str, allowed: bool) -> None:
    assert (wrong(module, name) is None) == allowed


def test_relative_imports_and_inner_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mamba.py"
    path.write_text("from ..models import base\ndef f():\n    from . import norm\n    import kernels.scan\n")
    names = [name for _, name in imported(path, "ssm_modal.layers.mamba")]
    assert names == ["ssm_modal.models.base", "ssm_modal.layers.norm", "kernels.scan"]


def test_nobody_imports_a_folder_by_its_short_name() -> None:
    """Tests and benchmarks too: `kernels` is the name of a package of Hugging Face."""
    short = ("kernels", "tasks", "datamodules")
    files = [p for folder in ("tests", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py")]
    problems = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files
        for line, name in imported(path, "tests." + path.stem)
        if name.split(".")[0] in short
    ]
    assert not problems, "\n".join(problems)


def test_the_core_imports_only_core_dependencies_when_it_is_imported() -> None:
    """No statement at a module's top level, in what needs the core alone, imports an extra."""
    allowed = {*CORE, "ssm_modal", "__future__", *sys.stdlib_module_names}
    problems = []
    for path, module in sources():
        if layer_of(module) in ("tasks", "datamodules", "cli", "tokenizers") or module in FOR_AN_EXTRA:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node in tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            problems += [f"{path.name}: {n}" for n in names if n.split(".")[0] not in allowed]
    assert not problems, "\n".join(problems)


def run(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_extra() -> None:
    heavy = (
        "('triton', 'lightning', 'pytorch_lightning', 'transformers', 'jsonargparse', 'tokenizers', 'timm')"
    )
    out = run(
        "import sys, ssm_modal\n"
        f"print([m for m in {heavy} if m in sys.modules], ssm_modal.__version__, 'torch' in sys.modules)\n"
    )
    assert out.split() == ["[]", "0.1.0", "False"]


def test_a_model_runs_on_the_cpu_without_extras() -> None:
    """With triton and every extra made unimportable, as in an installation of the core without Triton."""
    out = run(
        "import sys\n"
        "for name in ('triton', 'lightning', 'transformers', 'jsonargparse', 'tokenizers', 'timm', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "import torch, ssm_modal\n"
        "model = ssm_modal.create_model('mamba_lm', vocab_size=8, d_model=16, n_layers=1)\n"
        "model(torch.tensor([[1, 2, 3]]))[0].sum().backward()\n"
        "print(ssm_modal.list_models('mamba_lm'), ssm_modal.load_pretrained.__name__)\n"
        "from ssm_modal.kernels import explain, selective_scan, selective_scan_ref\n"
        "u, A, B = torch.rand(1, 9, 2), -torch.rand(2, 3), torch.rand(1, 9, 3)\n"
        "ref = selective_scan_ref(u, u, A, B, B)\n"
        "for backend in (None, 'torch'):\n"
        "    torch.testing.assert_close(selective_scan(u, u, A, B, B, backend=backend), ref)\n"
        "print([explain(op, device='cuda').backend for op in ('selective_scan', 'rms_norm')])\n"
    )
    assert out.splitlines() == ["['mamba_lm'] load_pretrained", "['torch', 'torch']"]


def test_every_exported_name_exists() -> None:
    import ssm_modal

    assert set(ssm_modal.__all__) == set(ssm_modal._HOME)
    for name in ssm_modal.__all__:
        assert getattr(ssm_modal, name).__name__ == name
        assert name in dir(ssm_modal)
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        ssm_modal.creat_model  # noqa: B018


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_runs_with_the_repository_as_working_directory() -> None:
    """`kernels` is also a package of Hugging Face, which transformers looks for: our folder must not pass
    for it."""
    out = run(
        "import torch\n"
        "from transformers import MambaConfig, MambaForCausalLM\n"
        "config = MambaConfig(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1)\n"
        "model = MambaForCausalLM(config).eval()\n"
        "print(tuple(model(torch.tensor([[1, 2, 3]])).logits.shape), torch.__name__)\n"
    )
    assert out.strip() == "(1, 3, 11) torch"
