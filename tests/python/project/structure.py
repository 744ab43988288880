"""What a package's files may not do to each other, read from their source: import in a circle, use private
names of another file, grow without end.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

#: Private names of other libraries: {module of the package, with those below it: names}. (Classes of the package may
#: define them too, to be called by those libraries.)
OTHERS = {
    "coldrow": {
        # torch.nn.Module, and what torch's DistributedDataParallel is told
        "_apply",
        "_buffers",
        "_ddp_params_and_buffers_to_ignore",
        "_load_from_state_dict",
        "_modules",
        "_parameters",
        "_save_to_state_dict",
        "_set_params_and_buffers_to_ignore_for_model",
        # torch.Tensor, torch.autograd
        "_C",
        "_current_graph_task_id",
        "_indices",
        "_nnz",
        "_values",
    },
    "coldrow.torchrec": {
        "_col_offset",
        "_device",
        "_emb_module",
        "_emb_modules",
        "_embedding_shardings",
        "_env",
        "_grouped_embedding_configs",
        "_grouped_embedding_configs_per_rank",
        "_local_cols",
        "_local_rows",
        "_lookups",
        "_pg",
        "_pooling",
        "_rank",
        "_row_offset",
        "_sharding_type_to_sharding",
        "_sharding_types",
        "_use_index_dedup",
    },
}
#: Modules in C++, of which there is no source here.
NATIVE = frozenset({"_core", "_cuda"})


@dataclass
class Class:
    """What a class is derived from, and the private names it has, with their lines."""

    bases: list[str]
    names: dict[str, int] = field(default_factory=dict)


@dataclass
class Module:
    """A file of the package."""

    name: str
    path: Path
    tree: ast.Module
    is_package: bool
    #: What each name at hand was imported as: {"Table": "coldrow.nn.table.Table"}.
    imported: dict[str, str] = field(default_factory=dict)
    classes: dict[str, Class] = field(default_factory=dict)
    #: Private names it defines, in classes and outside of them; and those it sets on objects of any kind.
    defines: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)


def is_private(name: str) -> bool:
    """Whether a name is private, by one underscore. (``_value_`` is an enumeration's.)"""
    return bool(re.fullmatch(r"_[^_](.*[^_])?", name))


class Package:
    """A package's files, parsed. ``root`` is its folder; paths in what is reported are relative to ``top``."""

    def __init__(
        self, root: Path, top: Path | None = None, others: Mapping[str, Set[str]] = OTHERS
    ) -> None:
        self.top, self.others = top or root.parent, others
        self.modules: dict[str, Module] = {}
        for path in sorted(root.rglob("*.py")):
            parts = [root.name, *path.relative_to(root).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            self.modules[name] = Module(name, path, ast.parse(path.read_text()), is_package)
        for module in self.modules.values():
            self._read(module)

    def where(self, module: Module, line: int) -> str:
        """The place of a line, as compilers write it."""
        return f"{module.path.relative_to(self.top)}:{line}"

    # ------------------------------------------------------------------------------------- imports

    def _base(self, module: Module, node: ast.ImportFrom) -> str:
        """The module that ``from`` names."""
        if not node.level:
            return node.module or ""
        parts = module.name.split(".")
        parts = parts[: len(parts) - node.level + module.is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _named(self, module: Module) -> Iterator[tuple[int, str]]:
        """(line, module of the package) of each import in a file, wherever in it."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(module, node)
                for alias in node.names:
                    if alias.name in NATIVE:
                        continue
                    inner = f"{base}.{alias.name}"
                    yield node.lineno, inner if inner in self.modules else base
            elif isinstance(node, ast.Call) and re.search(
                r"\bimport_module$", ast.unparse(node.func)
            ):
                given = node.args[0] if node.args else None
                if isinstance(given, ast.Constant) and isinstance(given.value, str):
                    yield node.lineno, given.value

    def imports(self, module: Module) -> dict[str, int]:
        """{module of the package: line} of what a file imports, with the packages that lie around it.

        Not the packages around the file itself: they are being imported already.
        """
        found: dict[str, int] = {}
        for line, name in self._named(module):
            if name in self.modules:
                found.setdefault(name, line)
            parts = name.split(".")
            for n in range(1, len(parts)):
                around = ".".join(parts[:n])
                if around in self.modules and not f"{module.name}.".startswith(f"{around}."):
                    found.setdefault(around, line)
        return found

    def circles(self) -> list[str]:
        """One text for each set of modules that import each other, with all imports among them."""
        graph = {name: self.imports(module) for name, module in self.modules.items()}
        reach = {name: self._reached(graph, name) for name in graph}
        done: set[str] = set()
        found = []
        for name in graph:
            if name in done or name not in reach[name]:
                continue
            circle = {other for other in reach[name] if name in reach[other]}
            done |= circle
            lines = [
                f"{self.where(self.modules[one], graph[one][other])} {one} imports {other}"
                for one in sorted(circle)
                for other in sorted(graph[one].keys() & circle)
            ]
            found.append("\n".join([f"circle of {len(circle)}:", *lines]))
        return found

    @staticmethod
    def _reached(graph: dict[str, dict[str, int]], name: str) -> set[str]:
        found: set[str] = set()
        ahead = list(graph[name])
        while ahead:
            other = ahead.pop()
            if other not in found:
                found.add(other)
                ahead += graph[other]
        return found

    # --------------------------------------------------------------------------------- private names

    def _read(self, module: Module) -> None:
        """Note what a file imports and defines."""
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{self._base(module, node)}.{alias.name}"
                    module.imported[alias.asname or alias.name] = whole
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.name if alias.asname else alias.name.partition(".")[0]
                    module.imported[alias.asname or name] = name
            elif isinstance(node, ast.ClassDef):
                self._read_class(module, node)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                module.sets.add(node.attr)
        module.defines |= {name for name, _ in names_bound(module.tree.body)}
        module.defines = {name for name in module.defines if is_private(name)}
        module.sets = {name for name in module.sets if is_private(name)}

    def _read_class(self, module: Module, node: ast.ClassDef) -> None:
        found = Class([ast.unparse(base).partition("[")[0] for base in node.bases])
        module.classes[node.name] = found
        names = [*names_bound(node.body), *names_of_self(node)]
        for name, line in names:
            if is_private(name):
                found.names.setdefault(name, line)
        module.defines |= found.names.keys()

    def _class(self, module: Module, name: str) -> tuple[Module, Class] | None:
        """The class of the package that a name in a file means, through imports of imports."""
        if name in module.classes:
            return module, module.classes[name]
        first, _, rest = name.partition(".")
        whole = module.imported.get(first)
        if whole is None:
            return None
        whole = f"{whole}.{rest}" if rest else whole
        home, _, name = whole.rpartition(".")
        if home not in self.modules or self.modules[home] is module:
            return None
        return self._class(self.modules[home], name)

    def _inherited(self, module: Module, kind: Class, seen: set[int]) -> dict[str, Module]:
        """{private name: the other file of a class above that has it}."""
        found: dict[str, Module] = {}
        for base in kind.bases:
            above = self._class(module, base)
            if above is None or id(above[1]) in seen:
                continue
            seen.add(id(above[1]))
            found |= self._inherited(*above, seen)
            found |= dict.fromkeys(above[1].names, above[0])
        return found

    def _owners(self, name: str) -> list[Module]:
        """The files that a private name belongs to."""
        defined = [module for module in self.modules.values() if name in module.defines]
        return defined or [module for module in self.modules.values() if name in module.sets]

    def private_uses(self) -> list[str]:
        """Each use of a private name that is another file's, or of another library and not listed."""
        found = []
        for module in self.modules.values():
            uses = {*self._uses(module), *self._overrides(module)}
            found += [f"{self.where(module, line)} {text}" for line, text in sorted(uses)]
        return found

    def _uses(self, module: Module) -> Iterator[tuple[int, str]]:
        files = {name.rpartition(".")[2] for name in self.modules}
        allowed = NATIVE | files | self._allowed(module)
        for line, name in names_used(module.tree):
            if not is_private(name) or name in allowed:
                continue
            owners = self._owners(name)
            if module not in owners:
                of = ", ".join(owner.name for owner in owners) or "no file here"
                yield line, f"{name} of {of}"
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = self._base(module, node)
            for alias in node.names:
                is_module = alias.name in NATIVE or f"{base}.{alias.name}" in self.modules
                if base in self.modules and is_private(alias.name) and not is_module:
                    yield node.lineno, f"{alias.name} of {base}"

    def _allowed(self, module: Module) -> set[str]:
        """The names of other libraries that a file may use."""
        lists = (k for k in self.others if f"{module.name}.".startswith(f"{k}."))
        return {name for k in lists for name in self.others[k]}

    def _overrides(self, module: Module) -> Iterator[tuple[int, str]]:
        for name, kind in module.classes.items():
            for inherited, home in self._inherited(module, kind, set()).items():
                mine = inherited in kind.names and inherited not in self._allowed(module)
                if mine and home is not module:
                    yield kind.names[inherited], f"{inherited} of {home.name}, overridden by {name}"


def names_bound(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """(name, line) of what statements of a module or class define, not those within functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id, inner.lineno
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield inner.name, inner.lineno  # below an if
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            for inner in ast.walk(node.value):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                    yield inner.value, inner.lineno


def names_of_self(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """(name, line) of what a class's functions set on their first argument."""
    for function in node.body:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args]
        if not arguments:
            continue
        me = arguments[0].arg
        for inner in ast.walk(function):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                if isinstance(inner.value, ast.Name) and inner.value.id == me:
                    yield inner.attr, inner.lineno
            elif (called := attribute_by_name(inner)) and called[0].endswith("setattr"):
                if isinstance(inner.args[0], ast.Name) and inner.args[0].id == me:
                    yield called[1], inner.lineno
            elif isinstance(inner, ast.Call) and ast.unparse(inner.func) == f"{me}.register_buffer":
                given = inner.args[0] if inner.args else None
                if isinstance(given, ast.Constant):
                    yield given.value, inner.lineno


def attribute_by_name(node: ast.AST) -> tuple[str, str] | None:
    """(function, attribute) of a call as getattr(x, "name"), x.__setattr__(y, "name", ...)."""
    functions = r"(\w+\.)*(getattr|hasattr|setattr|delattr|__setattr__|__getattribute__)"
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return None
    function, name = ast.unparse(node.func), node.args[1]
    if not re.fullmatch(functions, function) or not isinstance(name, ast.Constant):
        return None
    return ("setattr" if "set" in function else function, str(name.value))


def names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of each attribute that is read, set or deleted, by its name in a string too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.end_lineno or node.lineno, node.attr
        elif called := attribute_by_name(node):
            yield node.lineno, called[1]


def too_long(folder: Path, limit: int, top: Path) -> list[str]:
    """The Python files below a folder that have more lines than that; paths relative to ``top``."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        lines = len(path.read_text().splitlines())
        if lines > limit:
            found.append(f"{path.relative_to(top)}: {lines} lines, accepted: {limit}")
    return found
