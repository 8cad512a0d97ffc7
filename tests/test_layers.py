"""Imports point one way: pipelines -> model <- online; feature_repo.layout is pure bytes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = {"model", "pipelines", "online", "feature_repo", "deploy", "tests", "benchmarks"}
MAY_IMPORT = {
    "model": {"model"},
    "pipelines": {"pipelines", "model", "feature_repo.layout"},
    "online": {"online", "model", "feature_repo.layout"},
    "feature_repo": {"feature_repo", "model.errors"},
}
MODEL_NEEDS = {"torch", "triton", "numpy", "pyarrow", "safetensors", "fsspec"}


def imported_modules(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names imported by a file, `from a import b` as a.b."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_it_may(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for name in imported_modules(path):
            if name.split(".")[0] in PROJECT:
                allowed = any(name == a or name.startswith(f"{a}.") for a in MAY_IMPORT[package])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_layout_imports_neither_feast_nor_redis() -> None:
    roots = {name.split(".")[0] for name in imported_modules(ROOT / "feature_repo" / "layout.py")}
    assert roots <= set(sys.stdlib_module_names) | {"numpy", "feature_repo"}


def test_the_model_needs_few_libraries_at_import() -> None:
    for path in (ROOT / "model").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path, top_level_only=True)}
        extra = roots - MODEL_NEEDS - {"model"} - set(sys.stdlib_module_names)
        assert not extra, f"{path.relative_to(ROOT)} needs {extra} at import"


def test_the_model_imports_where_no_service_library_is() -> None:
    """Every module of model/ imports in a process where the other layers' libraries cannot be had."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "model").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'apache_beam', 'feast', 'redis', 'hiredis', 'grpc', 'prometheus_client'}:\n"
        "            raise ImportError(f'{name} is not to be had')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {modules!r}: __import__(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
