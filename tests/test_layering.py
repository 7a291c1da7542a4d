"""The layout rules of CONTRIBUTING.md: who may import whom, and what no package may do."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qvd_core", "qvd_diffusers", "qvd_nodes")
MAX_LINES = 450

CORE_MAY_IMPORT = sys.stdlib_module_names | {"torch", "safetensors", "qvd_core"}
# Extras of pyproject.toml, by file: imported inside a function only, so that the core works without them.
CORE_OPTIONAL = {"qvd_core/report/canvas.py": {"matplotlib", "PIL"}, "qvd_core/ops/kitchen.py": {"comfy_kitchen"}}
# Files that nothing imports unless what they need is there (`ops/dispatch.py` asks first; the hook runs in a build).
CORE_LAZY = {"qvd_core/ops/triton/": {"triton"}, "qvd_core/ops/cpu/hatch_hook.py": {"hatchling"}}
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_kitchen", "folder_paths", "nodes", "server"}
FORBIDDEN = {
    "qvd_diffusers": COMFYUI | {"qvd_nodes"},
    "qvd_nodes": {"qvd_diffusers"},
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {
    *("eval", "exec", "builtins.eval", "builtins.exec"),
    *("torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"),
}


def imports(tree: ast.Module, path: str) -> Iterator[tuple[str, int, bool]]:
    """Every imported module as (full dotted name, line, is it inside a function?), relative imports resolved."""
    inside = {
        id(child)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(function)
    }
    package = list(Path(path).parent.parts)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from .. import x` in qvd_core/ops/a.py starts at qvd_core; one dot more, at the repository.
            base = package[: max(0, len(package) - node.level + 1)] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}".lstrip(".") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                names = [node.args[0].value]
        for name in names:
            yield name, getattr(node, "lineno", 0), id(node) in inside


def uses(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every use of a dotted name as (the name with import aliases resolved, line)."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            head, dot, rest = ast.unparse(node).partition(".")
            yield aliases.get(head, head) + dot + rest, node.lineno


def violations(path: str, source: str) -> list[str]:
    """What the file breaks, one line each; `path` is relative to the repository, with forward slashes."""
    package = path.partition("/")[0]
    tree = ast.parse(source, filename=path)
    found = []
    for name, line, inside_function in imports(tree, path):
        top = name.partition(".")[0]
        if package == "qvd_core" and top not in CORE_MAY_IMPORT:
            optional = inside_function and top in CORE_OPTIONAL.get(path, ())
            lazy = any(path.startswith(where) and top in names for where, names in CORE_LAZY.items())
            if not optional and not lazy:
                found.append(f"{path}:{line}: qvd_core may not import {name}")
        if top in FORBIDDEN.get(package, ()):
            found.append(f"{path}:{line}: {package} may not import {name}")
        if top in PICKLES:
            found.append(f"{path}:{line}: {name} unpickles; use safetensors and JSON")
    found += [f"{path}:{line}: {name} is not allowed" for name, line in uses(tree) if name in UNSAFE]
    length = len(source.splitlines())
    if length > MAX_LINES:
        found.append(f"{path}: {length} lines, more than {MAX_LINES}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_package_keeps_the_rules(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no source found in {package}/: the rules were checked on nothing"
    found = [
        line
        for file in files
        for line in violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("qvd_core/a.py", "import diffusers"),
        ("qvd_core/a.py", "import numpy as np"),
        ("qvd_core/a.py", "from transformers.utils import logging"),
        ("qvd_core/a.py", "def f():\n    import qvd_diffusers.cli"),
        ("qvd_core/ops/a.py", "from ...qvd_nodes import x"),
        ("qvd_core/a.py", "import importlib\nimportlib.import_module('comfy.ops')"),
        ("qvd_core/a.py", "def f():\n    import matplotlib"),
        ("qvd_core/report/canvas.py", "import matplotlib.pyplot as plt"),
        ("qvd_core/ops/dispatch.py", "import triton"),
        ("qvd_core/ops/triton/a.py", "import numpy"),
        ("qvd_diffusers/a.py", "import comfy.model_management"),
        ("qvd_diffusers/a.py", "from qvd_nodes import x"),
        ("qvd_diffusers/a.py", "from .. import qvd_nodes"),
        ("qvd_nodes/a.py", "from qvd_diffusers import QVDConfig"),
        ("qvd_nodes/a.py", "from ..qvd_diffusers import QVDConfig"),
        ("qvd_core/a.py", "import pickle"),
        ("qvd_diffusers/a.py", "def f():\n    from pickle import loads"),
        ("qvd_core/a.py", "import torch\ntorch.load('x')"),
        ("qvd_core/a.py", "import torch as t\nt.load('x')"),
        ("qvd_core/a.py", "from torch import load as read\nread('x')"),
        ("qvd_core/a.py", "import torch\ntorch.save({}, 'x')"),
        ("qvd_core/a.py", "eval('1')"),
        ("qvd_nodes/a.py", "exec('1')"),
        ("qvd_core/a.py", "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_rules_find_a_bad_source(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("qvd_core/a.py", "import json, torch.nn.functional\nfrom safetensors.torch import load_file"),
        ("qvd_core/ops/a.py", "from . import b\nfrom ..spec import QuantSpec\nfrom qvd_core.spec import QuantSpec"),
        ("qvd_core/a.py", "model.eval()\nstate.load('x')\nre.compile('exec')"),
        ("qvd_core/report/canvas.py", "def draw():\n    import matplotlib"),
        ("qvd_core/ops/triton/a.py", "import triton.language as tl"),
        ("qvd_diffusers/a.py", "import diffusers, qvd_core\nfrom .config import QVDConfig"),
        ("qvd_nodes/a.py", "import comfy.ops\nfrom ..qvd_core import QuantSpec"),
        ("qvd_core/a.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_rules_leave_a_good_source(path: str, source: str) -> None:
    assert violations(path, source) == []
