"""Old names keep working until their version of removal, each with one warning for every line that uses it."""

import pickle
import pkgutil
import sys
import types
import warnings
from importlib import import_module

import pytest

import ssd_addon
from ssd_addon import _deprecation
from ssd_addon._deprecation import REGISTERED, Deprecated, due, moved, renamed_argument
from ssd_addon.plan import ViewPlan


@pytest.fixture(autouse=True)
def registry_kept():
    before = [*REGISTERED]
    yield
    REGISTERED[:] = before


@pytest.fixture
def old_module(monkeypatch):
    """A module from which a class has moved to ssd_addon.plan under another name."""
    module = types.ModuleType("moved_away")
    module.__getattr__ = moved("moved_away", {"Plan": "ssd_addon.plan.ViewPlan"}, removal="99.0")
    monkeypatch.setitem(sys.modules, "moved_away", module)
    return module


@renamed_argument("tint", "color", removal="99.0")
def paint(*, color):
    return color


class Painter:
    @renamed_argument("tint", "color", removal="99.0")
    def __init__(self, color):
        self.color = color


def test_a_name_that_was_moved_is_the_new_object_itself(old_module):
    with pytest.warns(FutureWarning, match=r"^moved_away\.Plan is deprecated .* 99\.0: use ssd_addon\.plan\.ViewPlan$"):
        assert old_module.Plan is ViewPlan
    with pytest.warns(FutureWarning):
        plan = old_module.Plan.shared_query(("content", "color"))
    assert isinstance(pickle.loads(pickle.dumps(plan)), ViewPlan)


def test_any_other_name_is_an_attribute_error_without_a_warning(old_module):
    with pytest.raises(AttributeError, match="^module 'moved_away' has no attribute 'Other'$"):
        _ = old_module.Other
    assert not hasattr(old_module, "__path__")


def test_an_argument_that_was_renamed_reaches_the_function_under_its_new_name():
    with pytest.warns(FutureWarning, match=r"^paint: argument tint is deprecated .* 99\.0: use color$"):
        assert paint(tint="red") == "red"
    with pytest.warns(FutureWarning, match="^Painter: argument tint"):
        assert Painter(tint="red").color == "red"
    assert paint(color="blue") == "blue"
    with pytest.raises(TypeError, match="^paint: expected color or its old name tint: got both$"):
        paint(color="red", tint="red")


def test_the_warning_comes_once_for_each_line_that_uses_the_old_name(old_module):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # as Python's own filter does with a FutureWarning
        for _ in range(3):
            paint(tint="red")
            _ = old_module.Plan
            from moved_away import Plan  # noqa: F401
        paint(tint="red")
    assert len(caught) == 4
    assert {w.filename for w in caught} == {__file__}
    assert len({w.lineno for w in caught}) == 4


def test_python_shows_the_warning_where_a_module_makes_the_call():
    """The reason for FutureWarning: DeprecationWarning is shown in __main__ alone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
        warnings.filterwarnings("ignore", category=DeprecationWarning, append=True)
        warnings.warn("hidden", DeprecationWarning, stacklevel=1)
        paint(tint="red")
    assert [w.category for w in caught] == [FutureWarning]


def test_the_version_of_removal_is_checked_where_it_is_written():
    with pytest.raises(ValueError, match=r"^version: expected one such as '0\.4': got 'soon'$"):
        moved("moved_away", {"a": "ssd_addon.b"}, removal="soon")


def test_an_old_name_is_due_from_its_version_of_removal_on():
    old = Deprecated("ssd_addon.old", "ssd_addon.new", "0.10", "ssd_addon")
    versions = {"0.9.9": False, "0.10.0rc1": True, "0.10.0": True, "0.11": True, "1.0": True}
    assert {version: bool(due([old], version)) for version in versions} == versions


def test_what_is_registered_is_found():
    moved("ssd_addon.plan", {"Plan": "ssd_addon.plan.ViewPlan"}, removal="0.1")
    renamed_argument("a", "b", removal="0.1")(paint)
    assert due(REGISTERED[-2:], ssd_addon.__version__) == [
        "ssd_addon.plan.Plan should be gone since 0.1", "paint: argument a should be gone since 0.1"
    ]  # fmt: skip


def test_no_old_name_has_outlived_its_version_of_removal():
    for module in pkgutil.walk_packages(ssd_addon.__path__, "ssd_addon."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    ours = [name for name in _deprecation.REGISTERED if name.module.partition(".")[0] == "ssd_addon"]
    assert due(ours, ssd_addon.__version__) == []
