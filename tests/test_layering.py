"""Imports point one way: tools never import each other, the library never a tool, no cycle."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("eval", "export", "ptq", "qat")
NUMPY_ONLY = (
    "spec",
    "affine",
    "histogram",
    "ranges",
    "clipping",
    "fold",
    "metrics",
    "diagnosis",
    "fixed_point",
    "integer_graph",
    "kernels",
    "files",
    "results",
)


def _modules():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in (*TOOLS, "lowbit")
        for path in (ROOT / package).rglob("*.py")
    }


def _imports(path):
    """Returns the modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def _edges():
    modules = _modules()
    edges = {}
    for name, path in modules.items():
        edges[name] = set()
        for imported in _imports(path):
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            if imported and imported not in (name, "lowbit"):
                edges[name].add(imported)
    return edges


def test_every_module_is_found():
    assert {"lowbit.affine", "qat.train", "lowbit.data.pipeline"} <= set(_edges())


def test_tools_import_no_other_tool_and_the_library_imports_none():
    for name, imported in _edges().items():
        package = name.partition(".")[0]
        allowed = {"lowbit"} if package == "lowbit" else {"lowbit", package}
        assert {other.partition(".")[0] for other in imported} <= allowed, name


def test_no_cycle():
    edges = _edges()
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for other in edges[name]:
            visit(other, [*path, name])
        done.add(name)

    for name in edges:
        visit(name, [])


def test_the_order_in_lowbits_docstring_is_the_order_of_imports():
    import lowbit

    text = lowbit.__doc__
    names = {name for name in _edges() if name.count(".") == 1 and name.startswith("lowbit.")}
    for name in names:
        assert name.removeprefix("lowbit.") in text, f"{name} is missing in lowbit/__init__.py"


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_numpy_only_modules_import_no_framework(name):
    code = (
        f"import sys; import lowbit.{name}; "
        "print([m for m in ('tensorflow', 'keras', 'jax', 'ai_edge_litert') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
