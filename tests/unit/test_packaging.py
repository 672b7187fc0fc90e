"""What `python -m build` makes, what the lock files pin, and how the Makefile sets up."""

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("index_builder", "transforms", "pipelines")
INFO = "kith_index-0.1.0.dist-info"


def run(
    command: list[str], cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def tracked(pattern: str) -> dict[str, Path]:
    """The files of the three packages by the name they have in a wheel."""
    return {
        path.relative_to(ROOT).as_posix(): path
        for package in PACKAGES
        for path in (ROOT / package).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it, offline."""
    tree = tmp_path_factory.mktemp("a source tree")
    for name in os.listdir(ROOT):
        path = ROOT / name
        if path.is_file():
            shutil.copy(path, tree)
        elif name in (*PACKAGES, "tests", "configs", "benchmarks"):
            shutil.copytree(path, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    result = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "out"], tree)
    assert result.returncode == 0, result.stdout + result.stderr
    return tree / "out"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(distributions / "kith_index-0.1.0-py3-none-any.whl")


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"{INFO}/METADATA"))


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, INFO}
    assert {name for name in names if name.endswith(".py")} == set(tracked("*.py"))


@pytest.mark.parametrize(
    ("pattern", "at_least"),
    [("weights/*", "transforms/encoders/"), ("*.j2", "pipelines/report/"), ("py.typed", "")],
)
def test_the_wheel_holds_the_data_unchanged(
    wheel: zipfile.ZipFile, pattern: str, at_least: str
) -> None:
    expected = tracked(pattern)
    assert any(name.startswith(at_least) for name in expected)
    for name, path in expected.items():
        assert (
            hashlib.sha256(wheel.read(name)).digest() == hashlib.sha256(path.read_bytes()).digest()
        ), name


def test_every_package_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_the_metadata(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Name"] == "kith-index"
    assert metadata["Version"] == "0.1.0"
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.13"}
    entry_points = wheel.read(f"{INFO}/entry_points.txt").decode()
    assert entry_points.split() == ["[console_scripts]", "kith", "=", "pipelines.cli:main"]
    assert any(name.startswith(INFO) and name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_source_distribution_leaves_the_tests_out(distributions: Path) -> None:
    with tarfile.open(distributions / "kith_index-0.1.0.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", *tracked("*.py")} <= names
    assert not {name for name in names if name.startswith(("tests/", "samples/", "benchmarks/"))}


def test_the_installed_command_runs_in_another_folder(distributions: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    wheel = distributions / "kith_index-0.1.0-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    result = run([*pip, "--target", str(place), str(wheel)], tmp_path)
    assert result.returncode == 0, result.stderr
    environment = {**os.environ, "PYTHONPATH": str(place)}
    where = "import pipelines.cli as cli; print(cli.__file__)"
    assert str(place) in run([sys.executable, "-c", where], tmp_path, environment).stdout
    shown = run([str(place / "bin" / "kith"), "--help"], tmp_path, environment)
    assert shown.returncode == 0, shown.stderr
    assert "nightly" in shown.stdout


# Lock files


def pins(name: str) -> dict[str, str]:
    """Distribution to version, for a lock file in which every line is an exact pin."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.lstrip().startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line)
            assert match, f"{name}: {line!r} is not an exact pin"
            found[canonicalize_name(match[1])] = match[2]
    return found


def requirements(metadata: Message, extra: str) -> list[Requirement]:
    everything = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [
        requirement
        for requirement in everything
        if bool(requirement.marker) == bool(extra)
        and (not requirement.marker or requirement.marker.evaluate({"extra": extra}))
    ]


@pytest.mark.parametrize(
    ("extra", "lock"), [("", "requirements.lock"), ("dev", "requirements-dev.lock")]
)
def test_the_lock_pins_what_setup_asks_for(metadata: Message, extra: str, lock: str) -> None:
    pinned = pins(lock)
    wanted = requirements(metadata, extra)
    assert len(wanted) > 5
    for requirement in wanted:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{lock} lacks {requirement}; run make lock"
        assert requirement.specifier.contains(version, prereleases=True), (
            f"{lock} pins {requirement.name} {version}, setup.py wants {requirement}; run make lock"
        )


def test_the_development_lock_only_adds() -> None:
    assert pins("requirements.lock").items() <= pins("requirements-dev.lock").items()
    assert not set(pins("requirements.lock")) & {"pytest", "ruff", "mypy", "opencv-python"}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_the_lock_names_no_host_and_says_how_it_is_made(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "make lock" in text


# Finding Python


def fake_python(folder: Path, name: str, version: str, has_venv: bool = True) -> Path:
    """A program that answers the search's question as a Python of this version would."""
    folder.mkdir(exist_ok=True, parents=True)
    program = folder / name
    program.write_text(
        "#!/bin/sh\n"
        f'case "$2" in *_base_executable*) echo "$0" ;; '
        f'*) printf "%s" "{version}{"" if has_venv else " without venv"}" ;; esac\n'
    )
    program.chmod(0o755)
    return program


def find_python(path: str, home: Path, python: str = "") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": str(home), "PYTHON": python}
    return run(["/bin/sh", str(ROOT / ".ci" / "find-python")], home, environment)


def test_only_an_old_python_gets_a_clear_message(tmp_path: Path) -> None:
    program = fake_python(tmp_path / "bin", "python3", "3.10.13")
    result = find_python(str(tmp_path / "bin"), tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"{program} is Python 3.10.13" in result.stderr
    assert "wanted: Python 3.11 or 3.12" in result.stderr
    assert "remedy" in result.stderr
    assert "make run-local PYTHON=/path/to/python3.11" in result.stderr


def test_no_python_at_all_gets_a_clear_message(tmp_path: Path) -> None:
    result = find_python(str(tmp_path / "nowhere"), tmp_path)
    assert result.returncode == 1
    assert "found: no Python that runs" in result.stderr


def test_a_shim_that_fails_and_a_python_without_venv_are_passed_over(tmp_path: Path) -> None:
    shims, bare, good = tmp_path / "shims", tmp_path / "bare", tmp_path / "a good one"
    shims.mkdir()
    (shims / "python3.11").write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    (shims / "python3.11").chmod(0o755)
    fake_python(bare, "python3.11", "3.11.2", has_venv=False)
    fake_python(bare, "python3", "3.13.0")
    wanted = fake_python(good, "python3.12", "3.12.1")
    result = find_python(f"{shims}:{bare}:{good}", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(wanted)

    result = find_python(f"{shims}:{bare}", tmp_path)
    assert result.returncode == 1
    assert "is Python 3.11.2 without venv" in result.stderr
    assert "is Python 3.13.0" in result.stderr


def test_the_versions_of_pyenv_are_found(tmp_path: Path) -> None:
    versions = tmp_path / ".pyenv" / "versions"
    fake_python(versions / "3.10.13" / "bin", "python", "3.10.13")
    wanted = fake_python(versions / "3.12.1" / "bin", "python", "3.12.1")
    result = find_python(str(tmp_path / "nowhere"), tmp_path)
    assert result.stdout.strip() == str(wanted)


def test_a_named_python_alone_is_tried(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin", "python3.11", "3.11.7")
    old = fake_python(tmp_path / "old", "python", "3.9.1")
    result = find_python(str(tmp_path / "bin"), tmp_path, python=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old} cannot be used" in result.stderr
    assert f"{old} is Python 3.9.1" in result.stderr


def test_a_virtual_environment_stands_for_its_base(tmp_path: Path) -> None:
    assert sys.prefix != sys.base_prefix, "the tests run in a virtual environment"
    result = find_python(str(Path(sys.executable).parent), tmp_path)
    assert result.returncode == 0, result.stderr
    assert not Path(result.stdout.strip()).is_relative_to(sys.prefix)


# The Makefile, with the real pip and venv and a project small enough to install offline

SCRATCH_BACKEND = '''
"""Builds a wheel of one module whose command says what it was called with."""
import zipfile

MODULE = "import sys\\n\\n\\ndef main():\\n    print('ran', *sys.argv[1:])\\n"


def build_editable(folder, config_settings=None, metadata_directory=None):
    info = "kith_index-0.1.0.dist-info"
    with zipfile.ZipFile(f"{folder}/kith_index-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("scratch_kith.py", MODULE)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: kith-index\\n"
                       "Version: 0.1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: scratch\\n"
                       "Root-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/entry_points.txt",
                       "[console_scripts]\\nkith = scratch_kith:main\\n")
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\\n" for name in wheel.namelist()))
    return "kith_index-0.1.0-py3-none-any.whl"
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile and its search for Python beside a tiny project, in a path with a space."""
    folder = tmp_path / "a clone" / "kith"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "setup.py").write_text("# version 1\n")
    (folder / "requirements.lock").write_text("# nothing\n")
    (folder / "requirements-dev.lock").write_text("# nothing\n")
    (folder / "backend.py").write_text(SCRATCH_BACKEND)
    (folder / "pyproject.toml").write_text(
        textwrap.dedent("""\
            [build-system]
            requires = []
            build-backend = "backend"
            backend-path = ["."]
            """)
    )
    return folder


def make(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
        and not name.startswith("PIP_")
    }
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}
    return run(["make", *arguments], project, {**inherited, **offline, **variables})


def installs(result: subprocess.CompletedProcess[str]) -> int:
    return result.stdout.count("-m pip ")


def test_setting_up_happens_once_and_again_when_its_inputs_change(project: Path) -> None:
    first = make(project, "run-local")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "ran nightly --config configs/local.yaml" in first.stdout
    assert installs(first) == 2

    again = make(project, "run-local", "ARGS=--set a.b=c")
    assert "ran nightly --config configs/local.yaml --set a.b=c" in again.stdout
    assert installs(again) == 0

    os.utime(project / "requirements.lock")
    assert installs(make(project, "run-local")) == 0

    (project / "setup.py").write_text("# version 2\n")
    assert installs(make(project, "run-local")) == 1

    (project / "requirements.lock").write_text("# something else\n")
    changed = make(project, "run-local")
    assert "Making .venv" in changed.stdout
    assert installs(changed) == 2

    moved = project.rename(project.with_name("moved here"))
    after = make(moved, "run-local")
    assert after.returncode == 0, after.stderr
    assert "Making .venv" in after.stdout


def test_a_failed_install_leaves_no_stamp_and_is_tried_again(project: Path) -> None:
    (project / "requirements.lock").write_text("kith-no-such-distribution==1.0\n")
    for _ in range(2):
        failed = make(project, "run-local")
        assert failed.returncode != 0
        assert "kith-no-such-distribution" in failed.stderr
        assert installs(failed) == 1
        assert list((project / ".venv").glob(".environment-*")) == []
    (project / "requirements.lock").write_text("# nothing\n")
    assert "ran nightly" in make(project, "run-local").stdout


def test_make_without_a_python_says_so_and_makes_nothing(project: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    fake_python(tools, "python3.10", "3.10.13")
    fake_python(tools, "python3", "3.10.13")
    for name in ("cat", "cksum", "cut", "make", "mkdir", "rm", "sh"):
        (tools / name).symlink_to(shutil.which(name) or name)
    home = {"HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path / "nowhere")}
    result = make(project, "run-local", PYTHON="", PATH=str(tools), **home)
    assert result.returncode == 2
    assert "is Python 3.10.13" in result.stderr
    assert "make run-local PYTHON=/path/to/python3.11" in result.stderr
    assert not (project / ".venv").exists()


def test_help_names_every_command(project: Path) -> None:
    shown = make(project)
    assert shown.returncode == 0
    for command in ("run-local", "test", "lint", "bench", "clean", "lock", "venv"):
        assert re.search(rf"^  {command} +\S", shown.stdout, re.MULTILINE), command


def test_the_tests_take_arguments_that_win(project: Path) -> None:
    shown = make(project, "--dry-run", "test", "ARGS=-n 0 tests/unit")
    (line,) = (line for line in shown.stdout.splitlines() if "-m pytest" in line)
    assert "-n auto" in line
    assert line.endswith(" -n 0 tests/unit")


def test_clean_removes_what_was_made(project: Path) -> None:
    for folder in (".venv", "workspace", "build", "pipelines/__pycache__", ".pytest_cache"):
        (project / folder).mkdir(parents=True)
    assert make(project, "clean").returncode == 0
    assert sorted(path.name for path in project.iterdir()) == [
        ".ci",
        "Makefile",
        "backend.py",
        "pipelines",
        "pyproject.toml",
        "requirements-dev.lock",
        "requirements.lock",
        "setup.py",
    ]
    assert list((project / "pipelines").iterdir()) == []
