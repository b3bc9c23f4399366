"""The scripts of examples/pipelines as modules, named apart from the frameworks that they are called after."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples" / "pipelines"


def script(name: str) -> ModuleType:
    """A script by its path below examples/pipelines, without the ending."""
    spec = importlib.util.spec_from_file_location("script_" + name.replace("/", "_"), FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
