"""The structure that the code promises: import direction, public names, and a light import."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bayesguard as bg

PACKAGE = Path(bg.__file__).parent

# Each part may import from its own level (its own part only) and from the levels before it.
LEVELS = [
    {"errors", "looks"},
    {"checks"},
    {"predictive", "sampling", "shift", "exponential_integral", "text_tensors", "weights"},
    {"likelihoods", "priors"},
    {"guides"},
    {"layers"},
    {"data", "metrics"},
    {"calibration"},
    {
        "pyro_scope",
        "simulation_based_calibration",
        "inference_data",
        "adaptive",
        "adversarial",
        "balanced",
        "checkpoint",
        "history",
        "results",
        "sklearn",
        "training_setup",
        "transfer",
    },
    {"grouping", "predictor_checks", "sheet", "shifting", "summaries"},
    {"training", "predictor"},
    {"joint"},
    {"posteriors"},
    {"testing", "evaluation", "network_features", "monitor"},
    {"comparison", "stacking"},
    {"plots", "advice"},
    {"report", "tables"},
    {"benchmarks"},
    {"cli"},
]
HEAVY = {
    "arviz",
    "torchmetrics",
    "matplotlib",
    "sklearn",
    "transformers",
    "pandas",
    "pyro",
    "joblib",
    "typer",
    "tqdm",
    "scipy",
    "PIL",
    "pooch",
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool) -> set[str]:
    """The modules that a file imports, at its top level or anywhere but under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
                visit([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])

    visit(ast.parse(path.read_text()).body)
    return found


def level_of(part: str) -> int:
    return next(index for index, parts in enumerate(LEVELS) if part in parts)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = part_of(path)
    for name in imports(path, top_level=True):
        top, _, rest = name.partition(".")
        if top != "bayesguard" or not rest:
            continue
        other = rest.split(".")[0]
        if other == own or other.startswith("__"):
            continue
        assert level_of(other) < level_of(own), f"{own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_heavy_import_at_the_top(path: Path) -> None:
    if PACKAGE / "metrics" / "classes" in path.parents or path in (
        PACKAGE / "cli.py",
        PACKAGE / "benchmarks" / "commands.py",
        PACKAGE / "sklearn.py",
    ):
        return  # loaded by themselves only, at first use
    heavy = {name.partition(".")[0] for name in imports(path, top_level=True)} & HEAVY
    assert not heavy, f"{path.name} imports {heavy}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"from bayesguard import *; import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    before = "import torch, sys; print(sorted(%r & set(sys.modules)))" % HEAVY  # noqa: UP031
    with_torch = subprocess.check_output([sys.executable, "-c", before], text=True)
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == with_torch


def test_importing_the_package_loads_its_errors_only() -> None:
    code = "import bayesguard, sys; print(sorted(name for name in sys.modules if name.startswith('bayesguard.')))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "['bayesguard.errors']\n"


def test_public_names() -> None:
    assert set(PUBLIC) <= set(dir(bg))
    assert {name for name in dir(bg) if not isinstance(getattr(bg, name), ModuleType)} == set(PUBLIC) - set(MODULES)
    assert {name for name in PUBLIC if isinstance(getattr(bg, name), ModuleType)} == set(MODULES)
    with pytest.raises(AttributeError, match="no attribute 'MCDropuot'"):
        _ = bg.MCDropuot


def test_a_type_checker_sees_every_public_name() -> None:
    imported = {
        alias.asname
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported - {None} == set(PUBLIC)


MODULES = [
    *("calibration", "guides", "layers", "likelihoods", "metrics", "plots", "posteriors", "predictive", "priors"),
    *("report", "sampling", "shift", "testing"),
]
PUBLIC = [
    *MODULES,
    "BadFile",
    "BalancedSampler",
    "BadInput",
    "BadType",
    "BayesguardError",
    "BayesguardWarning",
    "CalibrationMonitor",
    "CalibrationWarning",
    "DeepEnsemble",
    "Decomposition",
    "Deterministic",
    "IdenticalDraws",
    "MCDropout",
    "NotFitted",
    "Predictive",
    "Predictor",
    "RandomnessWarning",
    "ConvergenceWarning",
    "NUTS",
    "HMC",
    "PyroPredictor",
    "Variational",
    "UnsupportedNetwork",
    "compare",
    "evaluate",
    "features",
    "stack",
]
SUBMODULES = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}


def test_nothing_unsafe_is_loaded_from_files() -> None:
    """No pickle, no torch.load, no eval: a file must never run code."""
    for path in modules():
        tree = ast.parse(path.read_text())
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}, path
