"""Which module may import which: arrows between the rooms point one way, and there are no circles.

Every import statement counts, those inside functions and those for type checkers too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("export", "models", "runner", "sampler")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(p): p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """The project's modules that a module names in its import statements, without "tokenloop."."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; full names are the rule"
            # What is imported may be a module of the package that is named.
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            name = name.removeprefix("tokenloop.")
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What each module imports of the others."""
    return {module: imports_of(module) for module in FILES}


def violations(imports: dict[str, set[str]], source: str, *targets: str) -> list[str]:
    """The `imports` of modules under `source` that are of modules under one of `targets`."""

    def is_under(module: str, package: str) -> bool:
        return module == package or module.startswith(f"{package}.")

    return [
        f"{module} -> {imported}"
        for module, found in imports.items()
        if is_under(module, source)
        for imported in sorted(found)
        if any(is_under(imported, target) for target in targets)
    ]


def circles(imports: dict[str, set[str]]) -> dict[str, list[str]]:
    """The modules that import one another in a circle, or lie between two circles, and which of
    each other they import."""
    left = {module: found - {module} for module, found in imports.items()}
    # What imports nothing that is left is in no circle, and neither is what nothing left imports.
    while free := [module for module, found in left.items() if not found & left.keys()]:
        for module in free:
            del left[module]
    while unused := left.keys() - set().union(*left.values()):
        for module in unused:
            del left[module]
    return {module: sorted(found & left.keys()) for module, found in left.items()}


def test_imports_are_seen_wherever_they_stand(imports):
    assert all(any(module.startswith(f"{room}.") for module in FILES) for room in ROOMS)
    # At the top, of a package's module, and within a function.
    assert {"runner.errors", "runner.compare"} <= imports["runner.run"]
    assert "runner.engines.executorch_abi" in imports["runner.engines.executorch_runtime"]
    engines = {"runner.engines.inductor", "runner.engines.launches"}
    assert engines <= imports["runner.model"]


def test_circles_are_seen():
    arrows = {"a": {"b", "a"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(arrows) == {"b": ["c"], "c": ["b"]}
    assert circles(arrows | {"c": {"d"}}) == {}


@pytest.mark.parametrize(
    "source, targets",
    [
        ("runner", ("export", "models", "sampler")),
        ("models", ("export", "runner", "sampler")),
        ("sampler", ("export", "runner")),
        ("export", ("runner",)),
        ("export.pte", ("export.pt2", "export.launches")),
        ("export.pt2", ("export.pte", "export.launches")),
        ("export.launches", ("export.pte", "export.pt2")),
    ],
    ids=str,
)
def test_arrows_point_one_way(imports, source, targets):
    assert violations(imports, source, *targets) == []


def test_of_models_the_sampler_knows_only_the_kernels(imports):
    found, kernels = (violations(imports, "sampler", name) for name in ("models", "models.kernels"))
    assert set(found) == set(kernels)


def test_there_are_no_circles(imports):
    assert circles(imports) == {}
