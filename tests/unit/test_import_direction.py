"""pipelines -> transforms -> index_builder, never back, and no Beam or TensorFlow at the bottom."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("index_builder", "transforms", "pipelines")
LAYERS = "pipelines -> transforms -> index_builder, never back"
INSIDE_PIPELINES = "in pipelines: commands -> the night -> stages -> configuration, never back"
BARE_LIBRARY = "index_builder knows neither Beam nor TensorFlow"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the three packages and of the contracts, free to be spoiled."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            tmp_path / package,
            ignore=shutil.ignore_patterns("__pycache__", "weights"),
        )
    return tmp_path


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def broken_contracts(output: str) -> set[str]:
    return {name for name in (LAYERS, INSIDE_PIPELINES, BARE_LIBRARY) if f"{name} BROKEN" in output}


def test_the_packages_keep_the_direction(tree: Path) -> None:
    result = lint_imports(tree)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{LAYERS} KEPT" in result.stdout
    assert f"{INSIDE_PIPELINES} KEPT" in result.stdout
    assert f"{BARE_LIBRARY} KEPT" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("index_builder/wrong.py", "import apache_beam as beam", {BARE_LIBRARY}),
        ("index_builder/wrong.py", "from tensorflow import io", {BARE_LIBRARY}),
        ("index_builder/wrong.py", "import tensorflow_io", {BARE_LIBRARY}),
        ("index_builder/wrong.py", "def late():\n    import keras", {BARE_LIBRARY}),
        ("index_builder/wrong.py", "import pipelines", {LAYERS}),
        ("index_builder/wrong.py", "from transforms import sources", {LAYERS}),
        ("transforms/encoders/wrong.py", "import pipelines.report", {LAYERS}),
        ("pipelines/sections/wrong.py", "from pipelines import config", {INSIDE_PIPELINES}),
        ("pipelines/commands/wrong.py", "def late():\n    import pipelines.cli", {INSIDE_PIPELINES}),
    ],
)
def test_a_forbidden_import_is_refused(tree: Path, module: str, line: str, broken: set[str]) -> None:
    (tree / module).write_text(f"{line}\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert broken <= broken_contracts(result.stdout)
    assert module.removesuffix(".py").replace("/", ".") in result.stdout
