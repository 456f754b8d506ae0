"""A package that only some uses need is told by its extra, in one sentence everywhere."""

import sys
from importlib import metadata

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.extras import EXTRAS, check_extra, missing_extra


def test_extras_are_those_of_the_project() -> None:
    """Each brings the package that it is said to bring."""
    listed = metadata.requires("edgeroute") or []
    for package, extra in EXTRAS.items():
        name = package.replace("_", "-")
        assert any(
            each.startswith(name) and f'extra == "{extra}"' in each.replace("'", '"')
            for each in listed
        ), package


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_extra("this test", "click")  # is installed, of an extra or not
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError) as one:
        check_extra("--png", "click", "resvg_py")
    assert str(one.value) == (
        "--png needs resvg-py, which is not installed; install with: "
        "pip install 'edgeroute[report]'"
    )
    with pytest.raises(UsageError) as both:
        check_extra("a report", "resvg_py", "pyarrow", otherwise="write CSV")
    assert str(both.value) == (
        "a report needs resvg-py, pyarrow, which are not installed; install with: "
        "pip install 'edgeroute[report]', or write CSV"
    )


def test_an_import_that_failed_is_told_by_the_package() -> None:
    deep = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    assert "needs torch" in str(missing_extra(deep))
    assert "edgeroute[train]" in str(missing_extra(deep))
    for name in ("edgeroute.nowhere", None):  # a fault of ours keeps its traceback
        assert missing_extra(ModuleNotFoundError("No module", name=name)) is None
