"""Imports go one way: predictors ← hybrid ← profiler. Within hybrid, a layer imports only itself
and earlier layers.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hybrid

PACKAGES = Path(hybrid.__file__).parents[1]

# A module may import from its own layer and from those before it.
LAYERS = [
    [
        "hybrid.errors",
        "hybrid.files",
        "hybrid.limits",
        "hybrid.notices",
        "hybrid.progress",
        "hybrid.threads",
    ],
    ["hybrid.kernels"],
    ["hybrid.model"],
    ["hybrid.checkpoint", "hybrid.weights"],
    ["hybrid.placement"],
    ["hybrid.text"],
    ["hybrid.engine"],
    ["hybrid.hub"],
    ["hybrid.evaluation", "hybrid.checking", "hybrid.exporting", "hybrid.inspecting"],
    ["hybrid", "hybrid.public"],  # the public names
    ["hybrid.server"],
    ["hybrid.cli"],
    [
        "hybrid.run",
        "hybrid.serve",
        "hybrid.bench",
        "hybrid.eval",
        "hybrid.lm_eval",
        "hybrid.selfcheck",
        "hybrid.setup",
        "hybrid.plan",
        "hybrid.export",
        "hybrid.inspect",
        "hybrid.__main__",
    ],
]
# hybrid reads predictor files, but must not import what trains them.
READS_PREDICTORS = {"predictors.errors", "predictors.file", "predictors.predictors"}
# Both read files and handle Ctrl-C in one way, and the leaf package cannot import it from hybrid.
READS_PREDICTORS |= {"predictors.reading", "predictors.schema", "predictors.interrupts"}
# Only these import torch, and they are loaded only if a GPU is requested.
IMPORTS_TORCH = ("hybrid.kernels.gpu.", "hybrid.engine.gpu.", "hybrid.checking.gpu")
# Every front-end may import the public names, the catalog, the progress bar and the shared options.
# FRONT_ENDS adds the package that the front-end is the command for, if there is one.
_USUAL = {"hybrid", "hybrid.hub.catalog", "hybrid.cli.progress_bar", "hybrid.cli.command_line"}
_USUAL |= {"hybrid.files"}
FRONT_ENDS = {
    "hybrid.run": _USUAL
    | {"hybrid.cli.closing_line", "hybrid.cli.conversation", "hybrid.cli.generation_options"}
    | {"hybrid.cli.kept_session", "hybrid.text.built_in_templates", "predictors.schema"},
    "hybrid.serve": _USUAL | {"hybrid.server", "hybrid.server.http_protocol"},
    "hybrid.cli.conversation": _USUAL | {"hybrid.cli.kept_session"},
    "hybrid.cli.kept_session": _USUAL,
    "hybrid.bench": _USUAL | {"hybrid.evaluation.speed"},
    "hybrid.eval": _USUAL | {"hybrid.evaluation", "hybrid.notices"},
    "hybrid.lm_eval": _USUAL | {"hybrid.evaluation.harness", "predictors.interrupts"},
    "hybrid.plan": _USUAL
    | {
        "hybrid.engine.loading.planning",
        "hybrid.notices",
        "hybrid.engine.loading.model_spec",
        "hybrid.placement.machine",
        "hybrid.placement.plan",
    }
    | {"hybrid.placement.solver", "hybrid.placement.time_model"},
    "hybrid.export": _USUAL | {"hybrid.exporting", "hybrid.notices"},
    "hybrid.inspect": _USUAL | {"hybrid.inspecting"},
    "hybrid.selfcheck": _USUAL | {"hybrid.checking", "hybrid.checking.gpu"},
}


def layer_of(module: str) -> int:
    """Return the index of the module's layer in LAYERS."""
    name = module
    while name:
        for index, names in enumerate(LAYERS):
            if name in names and (name != "hybrid" or module == "hybrid"):
                return index
        name = name.rpartition(".")[0]
    pytest.fail(f"{module} belongs to no layer: add it to LAYERS")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGES).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[str]:
    """Return torch and our own modules if the file imports them anywhere in it.

    `from package import module` counts as an import of the module.
    """
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (PACKAGES / inner.replace(".", "/")).with_suffix(".py").exists()
                names.append(inner if is_module else str(node.module))
    return [
        n for n in names if n.partition(".")[0] in ("hybrid", "predictors", "profiler", "torch")
    ]


# The scripts that made the bundled model are not installed. An editable install still sees them.
FILES = [
    path for path in sorted((PACKAGES / "hybrid").rglob("*.py")) if "training" not in path.parts
]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_hybrid_imports_only_earlier_layers(path):
    module = module_name(path)
    for imported in imports_of(path):
        package = imported.partition(".")[0]
        if package == "torch" and module.startswith(IMPORTS_TORCH):
            continue
        if module == "hybrid.setup" and package in ("predictors", "profiler"):
            continue  # the setup command alone calls them
        if package == "predictors":
            assert imported in READS_PREDICTORS, f"{module} imports {imported}"
            continue
        assert package == "hybrid", f"{module} imports {imported}"
        if imported != module:
            assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"


def test_front_ends_use_public_names_and_the_catalog():
    for name, allowed in FRONT_ENDS.items():
        path = (PACKAGES / name.replace(".", "/")).with_suffix(".py")
        assert set(imports_of(path)) <= allowed


def test_predictors_never_import_hybrid():
    for path in (PACKAGES / "predictors").rglob("*.py"):
        assert {name.partition(".")[0] for name in imports_of(path)} <= {"predictors", "torch"}


def test_only_the_profiler_imports_the_profiler():
    for folder in ("hybrid", "predictors"):
        for path in (PACKAGES / folder).rglob("*.py"):
            if module_name(path) != "hybrid.setup":
                assert not any(name.startswith("profiler") for name in imports_of(path))
