"""The house's rules, checked on the source: imports point down, ctypes stays in runtime."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeroute

ROOT = Path(__file__).parent.parent
FLOORS = {
    "runtime": 1,
    "models": 2,
    "offload": 2,
    "skippers": 2,
    "edgeroute": 3,
    "tools": 4,
    "edgeroute/server": 4,
    "edgeroute/cli.py": 5,
    "edgeroute/__main__.py": 5,
    "edgeroute/commands": 5,
}
SIBLINGS = {"models", "offload", "skippers"}


def _sources() -> list[Path]:
    found = []
    for folder in ("runtime", "models", "offload", "skippers", "tools"):
        found += [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")]
    for path in (ROOT / "edgeroute").rglob("*.py"):
        inner = path.relative_to(ROOT)
        if not any(p.is_symlink() for p in [ROOT / q for q in inner.parents]):
            found.append(inner)
    return sorted(found)


def _home(module: str) -> str | None:
    """Folder or file that a dotted module of this project belongs to."""
    parts = module.split(".")
    if parts[0] != "edgeroute":
        return None
    if len(parts) > 1 and parts[1] in FLOORS:
        return parts[1]
    for key in (f"edgeroute/{'/'.join(parts[1:2])}", f"edgeroute/{'/'.join(parts[1:2])}.py"):
        if key in FLOORS:
            return key
    return "edgeroute"


def _folder(path: Path) -> str:
    text = path.as_posix()
    best = [key for key in FLOORS if text == key or text.startswith(key + "/")]
    return max(best, key=len)


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield node.lineno, module
            if module == "edgeroute":  # `from edgeroute import engine` names a module too
                yield from ((node.lineno, f"edgeroute.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", _sources(), ids=str)
def test_imports_point_strictly_down(path: Path) -> None:
    """A planted upward import, or one between siblings, must fail here."""
    if path.as_posix() == "edgeroute/__init__.py":
        return  # loads nothing: its imports are for type checkers only
    mine = _folder(path)
    for line, module in _imports(path):
        home = _home(module)
        if home is None or home == mine or module in ("edgeroute", "edgeroute.__version__"):
            continue
        assert FLOORS[home] <= FLOORS[mine], f"{path}:{line} imports {module} from above"
        assert not {home, mine} <= SIBLINGS, f"{path}:{line} imports {module}, a sibling"


def test_only_runtime_uses_ctypes() -> None:
    for path in _sources():
        if path.parts[0] != "runtime":
            assert "ctypes" not in {m.split(".")[0] for _, m in _imports(path)}, path


def test_importing_the_package_loads_nothing() -> None:
    """An eager __init__ would close import cycles and make `import edgeroute.runtime` slow."""
    code = (
        "import sys, edgeroute, edgeroute.runtime, edgeroute.models\n"
        "heavy = {'numpy', 'llama_cpp', 'rich', 'click', 'torch', 'edgeroute.engine'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_engine_never_imports_llama_cpp() -> None:
    """Only its shared libraries are used; importing it costs more than the rest together."""
    code = "import sys, edgeroute; edgeroute.Runtime; print('llama_cpp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_first_token_waits_for_no_import_that_it_does_not_need() -> None:
    """Each of these costs a small model 1 % of the time to its first token, or more."""
    code = (
        "import sys, edgeroute.engine, edgeroute.loaded, edgeroute.engine_setup\n"
        "needless = {'numpy.random', 'statistics', 'fractions', 'secrets', 'filelock', 'jinja2',\n"
        "            'asyncio', 'ssl', 'http.client', 'edgeroute.runtime.grammar'}\n"
        "print(sorted(needless & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_listed_for_the_wheel() -> None:
    """An unlisted nested package would be missing from the wheel without any error."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = set()
    for path in _sources():
        if path.name == "__init__.py":
            parts = path.parent.parts
            folders.add(".".join(parts if parts[0] == "edgeroute" else ("edgeroute", *parts)))
    assert folders == set(listed)


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in edgeroute.__all__:
        assert getattr(edgeroute, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Runtme'"):
        _ = edgeroute.Runtme  # type: ignore[attr-defined]


def test_files_and_functions_stay_small() -> None:
    """Files up to 600 lines, functions up to 60: beyond that, nobody reads them whole."""
    for path in _sources():
        text = (ROOT / path).read_text(encoding="utf-8")
        assert text.count("\n") <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = (node.end_lineno or 0) - node.lineno + 1
                assert n_lines <= 60, f"{path}:{node.lineno} {node.name} has {n_lines} lines"
