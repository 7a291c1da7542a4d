"""The contract with ComfyUI: the stubs of `tests/comfyui_api_stubs` are as a real checkout is, and hold all QVD uses.

Everything is read from source text, so that a checkout needs no working environment; only `comfy_kitchen`, a package
of its own, is asked by its interpreter. What is compared: every public function, class, method and attribute of the
stubs has its counterpart in ComfyUI, where every argument that the stub takes is taken too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

from tests.comfyui.server import comfyui_path, comfyui_python

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "tests" / "comfyui_api_stubs"
PACK = ROOT / "qvd_nodes"
OWN_STUBS = {"stub_control"}  # for tests only
NODE_TYPES = "ComfyTypeIO"  # what `io.Custom` makes
INSTANCES = {"ModelPatcher": "comfy.model_patcher.ModelPatcher", "BaseModel": "comfy.model_base.BaseModel"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str  # "positional", "keyword", "args" or "kwargs"
    default: bool


@dataclass
class External:
    """Something of another package."""

    name: str


@dataclass
class Value:
    """Something that is neither a function nor a class nor a module."""

    node: ast.AST | None


@dataclass
class Found:
    """A function or class; `outer` are the classes around it, the innermost last."""

    module: Module
    node: Definition
    outer: tuple[ast.ClassDef, ...] = ()


Thing = "Module | Found | Value | External"


class Tree:
    """The source files below one folder."""

    def __init__(self, root: Path):
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module or package of this dotted name; None where the tree has none."""
        if name not in self._modules:
            base = self.root.joinpath(*name.split("."))
            files = (base.with_suffix(".py"), base / "__init__.py")
            path = next((file for file in files if file.is_file()), None)
            known = path is not None or (base.is_dir() and any(base.glob("*.py")))
            self._modules[name] = Module(self, name, path) if known else None
        return self._modules[name]

    def find(self, dotted: str) -> Thing | None:
        """What `dotted` names: the longest part that is a module, then its members."""
        parts = dotted.split(".")
        for count in range(len(parts), 0, -1):
            thing: Thing | None = self.module(".".join(parts[:count]))
            if thing is not None:
                for part in parts[count:]:
                    thing = member(thing, part)
                return thing
        return None


@dataclass
class Module:
    tree: Tree
    name: str
    path: Path | None  # None: a folder without __init__.py
    _resolving: set[str] = field(default_factory=set)

    @cached_property
    def names(self) -> dict[str, ast.stmt]:
        """The statement that binds each top-level name; of several the first."""
        body = ast.parse(self.path.read_text(encoding="utf-8")).body if self.path else []
        bound: dict[str, ast.stmt] = {}
        for statement in statements(body):
            for name in bindings(statement):
                bound.setdefault(name, statement)
        return bound

    @property
    def package(self) -> str:
        inside = self.path is None or self.path.name == "__init__.py"
        return self.name if inside else self.name.rpartition(".")[0]

    def resolve(self, name: str) -> Thing | None:
        statement = self.names.get(name)
        if statement is None:
            star = self.names.get("*")
            if isinstance(star, ast.ImportFrom):
                source = self.tree.module(self._source(star))
                return None if source is None else source.resolve(name)
            return self.tree.module(f"{self.name}.{name}")
        if isinstance(statement, Definition):
            return Found(self, statement)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
            target = alias.name if alias.asname else alias.name.partition(".")[0]
            return self.tree.module(target) or External(target)
        if isinstance(statement, ast.ImportFrom):
            return self._imported(statement, name)
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Name | ast.Attribute) and name not in self._resolving:
            self._resolving.add(name)
            try:
                return self.evaluate(value) or Value(value)
            finally:
                self._resolving.discard(name)
        return Value(value)

    def evaluate(self, node: ast.expr) -> Thing | None:
        """What a dotted name means at the top level of this module."""
        if isinstance(node, ast.Name):
            return self.resolve(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.evaluate(node.value)
            return None if owner is None else member(owner, node.attr)
        return None

    def _imported(self, statement: ast.ImportFrom, name: str) -> Thing | None:
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        source = self._source(statement)
        if source == self.name:
            return self.tree.module(f"{source}.{original}")
        module = self.tree.module(source)
        return External(f"{source}.{original}") if module is None else module.resolve(original)

    def _source(self, statement: ast.ImportFrom) -> str:
        base = self.package.split(".")[: len(self.package.split(".")) - statement.level + 1] if statement.level else []
        return ".".join([*base, *([statement.module] if statement.module else [])])


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, those in branches included, those in functions and classes not."""
    for statement in body:
        yield statement
        if not isinstance(statement, Definition):
            for part in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(statement, part, []):
                    yield from statements(inner.body) if isinstance(inner, ast.ExceptHandler) else statements([inner])


def bindings(statement: ast.stmt) -> list[str]:
    if isinstance(statement, Definition):
        return [statement.name]
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def bases(found: Found) -> Iterator[Thing | None]:
    """The base classes: a name is looked up in the class around, then in the module."""
    assert isinstance(found.node, ast.ClassDef)
    for base in found.node.bases:
        beside = None
        if isinstance(base, ast.Name) and found.outer:
            around = Found(found.module, found.outer[-1], found.outer[:-1])
            beside = next((s for s in found.outer[-1].body if isinstance(s, ast.ClassDef) and s.name == base.id), None)
            if beside is not None and beside is not found.node:
                yield Found(found.module, beside, (*around.outer, found.outer[-1]))
                continue
        yield found.module.evaluate(base)


def member(thing: Thing, name: str) -> Thing | None:
    """The attribute `name` of a module or class; None where it is not known to have one."""
    if isinstance(thing, External):
        return External(f"{thing.name}.{name}")
    if isinstance(thing, Module):
        return thing.resolve(name)
    if not isinstance(thing, Found) or not isinstance(thing.node, ast.ClassDef):
        return None
    for statement in statements(thing.node.body):
        if name in bindings(statement):
            if isinstance(statement, Definition):
                return Found(thing.module, statement, (*thing.outer, thing.node))
            value = getattr(statement, "value", None)
            return (thing.module.evaluate(value) if isinstance(value, ast.Name | ast.Attribute) else None) or Value(
                value
            )
    inherited = next((found for base in bases(thing) if base is not None and (found := member(base, name))), None)
    if inherited is not None and not isinstance(inherited, External):
        return inherited
    return Value(None) if name in instance_attributes(thing.node) else inherited


def instance_attributes(node: ast.ClassDef) -> set[str]:
    """What methods assign to `self` or to the class."""
    owners = {"self", "cls", node.name}
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id in owners
    }


def signature(found: Found) -> list[Parameter] | None:
    """The parameters of a call, without `self`; None where nothing says what they are."""
    node = found.node
    if isinstance(node, ast.ClassDef):
        made = member(found, "__init__")
        if isinstance(made, Found):
            return signature(made)
        return dataclass_fields(found)
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [False] * (len(positional) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    parameters = [Parameter(a.arg, "positional", d) for a, d in zip(positional, defaults, strict=True)]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if found.outer and not static:
        parameters = parameters[1:]
    if arguments.vararg:
        parameters.append(Parameter("*", "args", True))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters += [Parameter(a.arg, "keyword", default is not None) for a, default in keywords]
    if arguments.kwarg:
        parameters.append(Parameter("**", "kwargs", True))
    return parameters


def dataclass_fields(found: Found) -> list[Parameter] | None:
    assert isinstance(found.node, ast.ClassDef)
    if not any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
        return None
    return [
        Parameter(statement.target.id, "keyword", statement.value is not None)
        for statement in found.node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]


def disagreements(stub: list[Parameter], real: list[Parameter]) -> Iterator[str]:
    """Why a call that the stub takes is not taken by ComfyUI in the same way."""
    by_name = {parameter.name: parameter for parameter in real}
    order = [parameter.name for parameter in real if parameter.kind == "positional"]
    for index, parameter in enumerate(stub):
        same = by_name.get(parameter.name)
        if same is None:
            if parameter.kind in ("args", "kwargs") or "**" not in by_name:
                yield f"takes no {parameter.name}"
        elif same.kind != parameter.kind:
            yield f"takes {parameter.name} as {same.kind}, the stub as {parameter.kind}"
        elif same.default != parameter.default:
            yield f"{parameter.name} {'has a' if same.default else 'has no'} default"
        elif parameter.kind == "positional" and order.index(parameter.name) != index:
            yield f"takes {parameter.name} in place {order.index(parameter.name)}, the stub in place {index}"
    known = {parameter.name for parameter in stub}
    for parameter in real:
        if not parameter.default and parameter.name not in known:
            yield f"also wants {parameter.name}"


def refusals(parameters: list[Parameter], positional: int, keywords: list[str]) -> Iterator[str]:
    """Why a call with so many positional arguments and these keywords cannot be made."""
    names = {parameter.name for parameter in parameters}
    places = [parameter for parameter in parameters if parameter.kind == "positional"]
    if positional > len(places) and "*" not in names and not all(p.kind == "keyword" for p in parameters):
        yield f"takes {len(places)} positional arguments, not {positional}"
    yield from (f"takes no {keyword}" for keyword in keywords if keyword not in names and "**" not in names)


# What the stubs hold.

STUB_TREE = Tree(STUBS)


def stubbed() -> Iterator[str]:
    """Every public name of the stubs, dotted, members of classes included."""
    tree = STUB_TREE
    for path in sorted(STUBS.rglob("*.py")):
        name = path.relative_to(STUBS).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        module = tree.module(name)
        if module is None or name in OWN_STUBS:
            continue
        exported = tree.module(name).names.get("__all__")  # type: ignore[union-attr]
        shown = ast.literal_eval(exported.value) if isinstance(exported, ast.Assign) else None
        for own, statement in module.names.items():
            imported = isinstance(statement, ast.Import | ast.ImportFrom | ast.If)
            if own.startswith("_") or (imported and own not in (shown or ())) or own == "TYPE_CHECKING":
                continue
            yield f"{name}.{own}"
            if isinstance(statement, ast.ClassDef):
                yield from (f"{name}.{own}.{inner}" for inner in members(statement))


def members(node: ast.ClassDef) -> Iterator[str]:
    """Public members of a class of the stubs, and those of the classes in it."""
    seen = set()
    for statement in statements(node.body):
        if isinstance(statement, ast.AnnAssign) and statement.value is None:
            continue  # only a type
        for name in bindings(statement):
            if not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name
                if isinstance(statement, ast.ClassDef):
                    yield from (f"{name}.{inner}" for inner in members(statement))
    yield from sorted(name for name in instance_attributes(node) - seen if not name.startswith("_"))


# What the pack uses.


@dataclass(frozen=True)
class Use:
    """One name that `qvd_nodes` uses: `chain` below a name of `_comfy.py`, or below a class; the call made of it."""

    where: str
    chain: str
    call: tuple[int, tuple[str, ...]] | None = None


def uses() -> list[Use]:
    custom = {
        target.id
        for path in PACK.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign | ast.AnnAssign) and ast.unparse(node.value or node).startswith("io.Custom(")
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else node.targets)
        if isinstance(target, ast.Name)
    }
    found: dict[str, Use] = {}
    for path in sorted(PACK.rglob("*.py")):
        if path.name != "_comfy.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for use in _uses_in(path.relative_to(ROOT).as_posix(), tree, custom):
                found.setdefault(f"{use.chain}{use.call}", use)
    return list(found.values())


def _uses_in(path: str, tree: ast.Module, custom: set[str]) -> Iterator[Use]:
    starts: dict[str, str] = {name: f"_comfy.io.{NODE_TYPES}" for name in custom}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "qvd_nodes._comfy":
            starts |= {alias.asname or alias.name: f"_comfy.{alias.name}" for alias in node.names}
    yield from (Use(path, chain) for chain in starts.values() if chain.count(".") == 1)
    yield from _chains(path, tree, starts)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            patchers = {name: INSTANCES["ModelPatcher"] for name in _patchers(function)}
            yield from _chains(path, function, patchers)


def _patchers(function: ast.FunctionDef) -> Iterator[str]:
    """Names of a function that hold a MODEL, as far as annotations and clones tell."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    known = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "ModelPatcher"}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "ModelPatcher":
            known.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).removesuffix(".clone()") in known:
            known.update(ast.unparse(target) for target in node.targets)
    yield from sorted(known)


def _chains(path: str, tree: ast.AST, starts: dict[str, str]) -> Iterator[Use]:
    """Attribute chains that begin with one of these names, and the calls made of them."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name) or id(node) in inner:
            continue
        head, _, rest = ast.unparse(node).partition(".")
        if head not in starts or not all(part.isidentifier() for part in rest.split(".") if rest):
            continue
        call = calls.get(id(node))
        if rest or call:
            yield Use(f"{path}:{node.lineno}", _below_model(starts[head], rest), _call(call))


def _below_model(start: str, rest: str) -> str:
    """A MODEL's `model` is a BaseModel; what that holds belongs to each kind of model."""
    if start == INSTANCES["ModelPatcher"] and rest.startswith("model."):
        return ".".join([INSTANCES["BaseModel"], *rest.split(".")[1:2]])
    return ".".join([start, *rest.split(".")[: 1 if start == INSTANCES["ModelPatcher"] else None]]).rstrip(".")


def _call(call: ast.Call | None) -> tuple[int, tuple[str, ...]] | None:
    if call is None or any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    return len(call.args), tuple(keyword.arg for keyword in call.keywords if keyword.arg)


def lookup(tree: Tree, chain: str) -> Thing | None:
    """What a chain of `uses` means in a tree of sources."""
    if not chain.startswith("_comfy."):
        return tree.find(chain)
    start, *rest = chain.split(".")[1:]
    thing = Module(tree, "qvd_nodes._comfy", PACK / "_comfy.py").resolve(start)
    for part in rest:
        thing = None if thing is None else member(thing, part)
    return thing


def problems_of_use(tree: Tree, use: Use) -> Iterator[str]:
    """Why a use cannot be made of the tree."""
    thing = lookup(tree, use.chain)
    if thing is None:
        yield f"{use.where} uses {use.chain}, which is not in {tree.root.name}"
    elif use.call is not None and isinstance(thing, Found):
        parameters = signature(thing)
        if parameters is not None:
            yield from (f"{use.where}: {use.chain} {problem}" for problem in refusals(parameters, *use.call))


def problems_of_stub(name: str, real_tree: Tree) -> Iterator[str]:
    """In what the stub called `name` is other than the real thing."""
    stub, real = STUB_TREE.find(name), real_tree.find(name)
    if real is None:
        yield f"ComfyUI has no {name}"
    elif isinstance(stub, Found) and isinstance(real, Found):
        if isinstance(stub.node, ast.ClassDef) != isinstance(real.node, ast.ClassDef):
            yield f"of {name} one is a class, the other a function"
            return
        own, theirs = signature(stub), signature(real)
        if own is not None and theirs is not None:
            yield from (f"ComfyUI's {name} {problem}" for problem in disagreements(own, theirs))
    elif isinstance(stub, Value) and isinstance(real, Value):
        texts = [value.node.value for value in (stub, real) if isinstance(value.node, ast.Constant)]
        if len(texts) == 2 and all(isinstance(text, str) for text in texts) and texts[0] != texts[1]:
            yield f"{name} is {texts[0]!r}, ComfyUI's is {texts[1]!r}"


USES = uses()
STUBBED = list(stubbed())


def test_the_stubs_hold_what_the_pack_uses() -> None:
    found = [problem for use in USES for problem in problems_of_use(STUB_TREE, use)]
    assert not found, "\n".join(found)


def test_the_walk_finds_what_it_should() -> None:
    """The comparisons below are worth as much as what is found to be compared."""
    chains = {use.chain for use in USES}
    assert {
        "_comfy.ops.cast_bias_weight",
        "_comfy.io.Int.Input",
        f"_comfy.io.{NODE_TYPES}.Input",
        "_comfy.sample",
        "comfy.model_patcher.ModelPatcher.clone",
        "comfy.model_base.BaseModel.state_dict_for_saving",
    } <= chains
    assert {"comfy.ops.manual_cast.Linear.comfy_cast_weights", "comfy_api.latest._io.Int.Input"} <= set(STUBBED)


@pytest.mark.parametrize(
    ("source", "call", "fine"),
    [
        ("def f(a, b=1): ...", (2, ()), True),
        ("def f(a, b=1): ...", (3, ()), False),
        ("def f(a, b=1): ...", (1, ("c",)), False),
        ("def f(a, *, b): ...", (1, ("b",)), True),
        ("def f(a, **rest): ...", (1, ("c",)), True),
        ("class f:\n def __init__(self, a): ...", (1, ()), True),
        ("class f:\n def __init__(self, a): ...", (2, ()), False),
        ("class g:\n def __init__(self, a): ...\nclass f(g): ...", (0, ("b",)), False),
        ("@dataclass\nclass f:\n a: int", (0, ("a",)), True),
        ("@dataclass\nclass f:\n a: int", (0, ("b",)), False),
    ],
)
def test_a_call_that_cannot_be_made_is_noticed(
    tmp_path: Path, source: str, call: tuple[int, tuple[str, ...]], fine: bool
) -> None:
    (tmp_path / "m.py").write_text(source)
    thing = Tree(tmp_path).find("m.f")
    assert isinstance(thing, Found)
    assert (not list(refusals(signature(thing) or [], *call))) is fine


@pytest.mark.parametrize(
    ("stub", "real", "same"),
    [
        ("def f(a, b=1): ...", "def f(a, b=2, c=3): ...", True),
        ("def f(a, b=1): ...", "def f(a, b): ...", False),
        ("def f(a): ...", "def f(a, b): ...", False),
        ("def f(a, b): ...", "def f(b, a): ...", False),
        ("def f(a, b=1): ...", "def f(a, **rest): ...", True),
        ("def f(a, *, b=1): ...", "def f(a, b=1): ...", False),
    ],
)
def test_a_signature_that_has_changed_is_noticed(tmp_path: Path, stub: str, real: str, same: bool) -> None:
    (tmp_path / "stub.py").write_text(stub)
    (tmp_path / "real.py").write_text(real)
    found = [Tree(tmp_path).find(f"{name}.f") for name in ("stub", "real")]
    parameters = [signature(thing) or [] for thing in found if isinstance(thing, Found)]
    assert (not list(disagreements(*parameters))) is same


# A real checkout.


@pytest.fixture(scope="module")
def checkout() -> Tree:
    path = comfyui_path()
    if path is None:
        pytest.skip("COMFYUI_PATH is not set: the contract was compared with nothing")
    return Tree(path)


def version(path: Path) -> str:
    text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    number = next(ast.literal_eval(s.value) for s in ast.parse(text).body if isinstance(s, ast.Assign))
    command = ["git", "-C", str(path), "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{number} (commit {commit or 'unknown'})"


@pytest.mark.comfyui
class TestCheckout:
    def test_what_was_compared(self, checkout: Tree, figure: Callable[[str, object], None]) -> None:
        figure("contract with ComfyUI", version(checkout.root))
        figure("names of the stubs compared", len(STUBBED))
        figure("uses by the pack compared", len(USES))

    def test_the_stubs_are_as_the_checkout(self, checkout: Tree) -> None:
        found = [problem for name in STUBBED for problem in problems_of_stub(name, checkout)]
        assert not found, "\n".join(found)

    def test_the_checkout_holds_what_the_pack_uses(self, checkout: Tree) -> None:
        found = [problem for use in USES for problem in problems_of_use(checkout, use)]
        assert not found, "\n".join(found)

    def test_what_loading_leaves_on_a_layer_is_known(self, checkout: Tree) -> None:
        """`model_copy` takes away by name what loading has put on layers: a new name would go along with each copy."""
        copying = (PACK / "model_copy.py").read_text(encoding="utf-8")
        handled = {n.value for n in ast.walk(ast.parse(copying)) if isinstance(n, ast.Constant)}
        left = {
            target.attr
            for name in ("model_patcher", "ops", "pinned_memory", "model_management")
            for target in _stores(checkout.root / "comfy" / f"{name}.py")
            if ast.unparse(target.value) in ("m", "s", "module")
        }
        left -= {name for name in left if name.startswith("_pin") or name.endswith("_lowvram_function")}
        assert "comfy_patched_weights" in left
        unknown = sorted(left - handled - HARMLESS)
        assert not unknown

    def test_quantized_tensors_are_ours(self, checkout: Tree) -> None:
        """`comfy_kitchen` in ComfyUI's environment has what QVD uses of the one in ours."""
        own, theirs = (Tree(_kitchen(python)) for python in (sys.executable, comfyui_python(checkout.root)))
        found = []
        for name in KITCHEN:
            pair = own.find(f"comfy_kitchen.tensor.base.{name}"), theirs.find(f"comfy_kitchen.tensor.base.{name}")
            if not all(isinstance(thing, Found) for thing in pair):
                found.append(f"no {name}")
                continue
            parameters = [signature(thing) for thing in pair if isinstance(thing, Found)]
            found += [f"{name} {problem}" for problem in disagreements(parameters[0] or [], parameters[1] or [])]
        assert not found, "\n".join(found)


HARMLESS = {
    *("weight", "bias", "in_features", "out_features"),  # the layer's own, set where it is built or loaded
    *("comfy_cast_weights", "comfy_force_cast_weights", "comfy_need_lazy_init_bias", "quant_format", "layout_type"),
    *("_full_precision_mm", "_full_precision_mm_config"),
    *("weight_comfy_model_dtype", "bias_comfy_model_dtype", "seed_key"),  # the same for every copy
}
KITCHEN = (
    *("QuantizedTensor.from_float", "QuantizedTensor.requantize_from_float", "QuantizedTensor.dequantize"),
    *("QuantizedTensor._copy_with", "QuantizedTensor.__torch_dispatch__"),
    *("QuantizedTensor.__init__", "QuantizedTensor.__tensor_flatten__", "QuantizedTensor.__tensor_unflatten__"),
    *("QuantizedLayout.quantize", "QuantizedLayout.dequantize", "QuantizedLayout.get_plain_tensors"),
    *("QuantizedLayout.state_dict_tensors", "QuantizedLayout.requantize_kwargs", "register_layout_class"),
    *("BaseLayoutParams", "BaseLayoutParams.to_device", "BaseLayoutParams.clone", "BaseLayoutParams.copy_from"),
    "BaseLayoutParams._tensor_fields",
)


def _stores(path: Path) -> Iterator[ast.Attribute]:
    """The attributes that a file assigns."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node


def _kitchen(python: str) -> Path:
    """The folder that an interpreter finds `comfy_kitchen` in."""
    code = "import importlib.util; print(importlib.util.find_spec('comfy_kitchen').origin)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return Path(found.stdout.strip()).parents[1]
