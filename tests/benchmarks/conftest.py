"""Scripts of tables as modules that note what they would train."""

import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from spikeformers.train.recipe import Recipe


@pytest.fixture
def noting(pytestconfig, monkeypatch) -> Callable[[str, Callable[[Recipe], SimpleNamespace]], ModuleType]:
    """Call with a script's name and what a training of a recipe shall give: `asked` holds the recipes by folder."""

    def load(name: str, result: Callable[[Recipe], SimpleNamespace]) -> ModuleType:
        path = pytestconfig.rootpath / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
        module.asked = {}

        def note(recipe: Recipe, folder):
            assert module.asked.setdefault(folder.name, recipe) == recipe, f"{folder.name} would hold two trainings"
            return result(recipe)

        monkeypatch.setattr(module, "done", note, raising=False)
        return module

    return load
