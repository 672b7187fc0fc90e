"""The worker images on paper: no engine builds them here, so what they are made of is checked."""

import ast
import dataclasses
import fnmatch
import importlib.metadata
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.unit.test_packaging import pins, tracked

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "docker"
DOCKERFILES = sorted(FOLDER.glob("Dockerfile.*"))
# The extra of setup.py that each file of pins stands for, and the library that it is about.
EXTRAS = {"gpu": "tensorflow", "jax": "jax", "openvino": "openvino"}
BOOT = "/opt/apache/beam/boot"
SITE = "/opt/kith/lib/python3.11/site-packages"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    keyword: str
    text: str

    @property
    def flags(self) -> dict[str, str]:
        """The options of COPY, such as `from`."""
        return dict(re.findall(r"(?:^|\s)--(\w+)=(\S+)", self.text)) if self.keyword == "COPY" else {}

    @property
    def words(self) -> list[str]:
        if self.text.startswith("["):
            return [str(word) for word in json.loads(self.text)]
        return [word for word in shlex.split(self.text) if not word.startswith("--")]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a build: its base image, its name ("" for the last one) and its instructions."""

    base: str
    name: str
    instructions: list[Instruction]

    def all(self, keyword: str) -> list[Instruction]:
        return [one for one in self.instructions if one.keyword == keyword]

    def settings(self, keyword: str) -> dict[str, str]:
        """The pairs of ENV or ARG."""
        pairs = [word.partition("=") for one in self.all(keyword) for word in one.words]
        return {name: value for name, _, value in pairs}


def parse(path: Path) -> tuple[dict[str, str], list[Stage]]:
    """Returns the arguments before the first stage, and the stages."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines) + "\n")
    defaults: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, text.splitlines()):
        keyword, _, rest = line.partition(" ")
        assert re.fullmatch(r"ARG|COPY|ENTRYPOINT|ENV|FROM|RUN|USER|WORKDIR", keyword), line
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name, []))
        elif stages:
            stages[-1].instructions.append(Instruction(keyword, rest.strip()))
        else:
            defaults.update([rest.split("=", 1)])
    return defaults, stages


def ignored(path: str) -> bool:
    """Tells whether .dockerignore keeps a path of the repository out of the build; last match wins."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        anywhere = "**/" in line and any(fnmatch.fnmatch(part, pattern) for part in parts)
        if anywhere or any(fnmatch.fnmatch(head, pattern) for head in heads):
            out = not line.startswith("!")
    return out


def sources(stage: Stage) -> list[str]:
    """What a stage copies from the repository."""
    return [word for one in stage.all("COPY") if not one.flags for word in one.words[:-1]]


def requirements(name: str) -> dict[str, str]:
    return pins(f"configs/docker/requirements-{name}.txt")


dockerfiles = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def test_both_images_are_here() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@dockerfiles
def test_everything_copied_is_in_the_repository_and_not_ignored(path: Path) -> None:
    _, stages = parse(path)
    copied = [source for stage in stages for source in sources(stage)]
    assert "requirements.lock" in copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert [source for source in copied if ignored(source)] == []
    names = [stage.name for stage in stages]
    for number, stage in enumerate(stages):
        for copy in stage.all("COPY"):
            if copy.flags:
                assert copy.flags["from"] in names[:number]


def test_what_is_no_part_of_an_image_does_not_travel() -> None:
    for path in (".git/config", ".venv/bin/python", "samples/README.md", "tests/conftest.py"):
        assert ignored(path), path
    for path in ("workspace/current.json", "transforms/__pycache__/embed.cpython-311.pyc"):
        assert ignored(path), path
    for path in ("transforms/embed.py", "setup.py", "configs/docker/requirements-gpu.txt"):
        assert not ignored(path), path


@dockerfiles
def test_the_wheel_of_what_is_copied_is_whole(path: Path, tmp_path: Path) -> None:
    _, stages = parse(path)
    for source in sources(stages[1]):
        if (ROOT / source).is_dir():
            names = [name for name in tracked("*") if name.startswith(f"{source}/")]
        else:
            names = [source]
        for name in names:
            if not ignored(name):
                (tmp_path / "build" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tmp_path / "build" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "../out", "."]
    done = subprocess.run(
        command, cwd=tmp_path / "build", capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert set(tracked("*.py")) <= set(names)
    assert set(tracked("weights/*")) <= set(names)


@dockerfiles
def test_the_versions_are_those_of_the_lock(path: Path) -> None:
    defaults, stages = parse(path)
    assert defaults == {"BEAM_VERSION": pins("requirements.lock")["apache-beam"]}
    beam, builder, final = stages
    assert (beam.base, beam.name) == ("apache/beam_python3.11_sdk:${BEAM_VERSION}", "beam")
    # An environment's links lead to the interpreter of the image in which it was made.
    assert builder.base == final.base
    assert re.fullmatch(r"python:3\.11-slim-\w+", final.base)
    assert "3.11" in SpecifierSet(setup_arguments()["python_requires"])


@dockerfiles
def test_the_worker_starts_with_the_boot_program_of_beam(path: Path) -> None:
    _, stages = parse(path)
    final = stages[-1]
    (entry,) = final.all("ENTRYPOINT")
    assert entry.words == [BOOT]
    copies = {one.words[-1]: one for one in final.all("COPY")}
    assert copies["/opt/apache/beam"].words == ["/opt/apache/beam", "/opt/apache/beam"]
    assert copies["/opt/apache/beam"].flags == {"from": "beam"}
    assert copies["/opt/kith"].flags == {"from": "builder"}
    environment = final.settings("ENV")
    assert environment["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"
    assert "/opt/kith/bin" in " ".join(one.text for one in final.all("ENV"))


@dockerfiles
def test_the_worker_is_not_root_unless_asked(path: Path) -> None:
    _, stages = parse(path)
    final = stages[-1]
    (user,) = final.all("USER")
    assert user.words == ["${RUN_AS}"]
    assert final.settings("ARG") == {"RUN_AS": "kith"}
    assert any("useradd" in one.text and one.text.endswith(" kith") for one in final.all("RUN"))


@dockerfiles
def test_every_command_is_valid_shell_and_installs_only_pins(path: Path) -> None:
    _, stages = parse(path)
    runs = [one.text for stage in stages for one in stage.all("RUN")]
    for text in runs:
        assert subprocess.run(["sh", "-n", "-c", text], check=False).returncode == 0, text
    installs = [part for text in runs for part in text.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("--no-deps" in part for part in installs)
    copied = {Path(source).name for source in sources(stages[1])}
    for part in installs[:2]:
        # The name of the image's extra is an argument of the build.
        wanted = re.sub(r"\$\{EXTRA\}", "*", part.split()[-1])
        assert fnmatch.filter(copied, wanted), part


def test_the_argument_extra_names_a_file_of_pins() -> None:
    _, stages = parse(FOLDER / "Dockerfile.gpu")
    assert stages[1].settings("ARG") == {"EXTRA": "gpu"}
    assert {path.stem.removeprefix("requirements-") for path in FOLDER.glob("*.txt")} == set(EXTRAS)


@pytest.mark.parametrize("name", EXTRAS)
def test_the_pins_only_add_to_the_lock(name: str) -> None:
    assert requirements(name)
    assert set(requirements(name)) & set(pins("requirements.lock")) == set()


def test_the_pins_for_a_gpu_are_what_tensorflow_asks_for() -> None:
    locked = pins("requirements.lock")
    assert importlib.metadata.version("tensorflow") == locked["tensorflow"]
    wanted = [Requirement(text) for text in importlib.metadata.requires("tensorflow") or ()]
    cuda = {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in wanted
        if one.marker and one.marker.evaluate({"extra": "and-cuda"}) and not one.marker.evaluate()
    }
    assert cuda["nvidia-cudnn-cu12"].startswith("8.9.")
    assert requirements("gpu") == cuda, "\n".join(f"{n}=={v}" for n, v in sorted(cuda.items()))


def test_jax_brings_a_cudnn_of_its_own() -> None:
    jax = requirements("jax")
    assert {jax[name] for name in ("jax", "jaxlib", "jax-cuda12-plugin")} == {"0.4.34"}
    assert jax["nvidia-cudnn-cu12"].startswith("9.")


def setup_arguments() -> dict[str, Any]:
    """What setup.py tells setuptools."""
    told: dict[str, Any] = {}
    real = setuptools.setup
    try:
        setuptools.setup = lambda **values: told.update(values)  # type: ignore[assignment]
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
    return told


@pytest.mark.parametrize(("extra", "library"), EXTRAS.items())
def test_the_extra_and_the_pins_agree(extra: str, library: str) -> None:
    arguments = setup_arguments()
    offered = [Requirement(text) for text in arguments["extras_require"][extra]]
    (wanted,) = [one for one in offered if canonicalize_name(one.name) == library]
    if extra == "gpu":
        # TensorFlow's extra brings the pins; the version is that of the lock.
        (base,) = [
            one for one in map(Requirement, arguments["install_requires"]) if one.name == library
        ]
        assert wanted.extras == {"and-cuda"}
        assert wanted.specifier == base.specifier
    else:
        assert wanted.specifier.contains(requirements(extra)[library])


@pytest.mark.parametrize("name", ["gpu", "jax"])
def test_the_libraries_of_the_wheels_are_found(name: str) -> None:
    _, stages = parse(FOLDER / "Dockerfile.gpu")
    environment = stages[-1].settings("ENV")
    found = environment["LD_LIBRARY_PATH"].split(":")
    assert found[0] == "/usr/local/nvidia/lib64"
    folders = {
        re.sub(r"^nvidia-(.*)-cu12$", r"\1", one).replace("-", "_")
        for one in requirements(name)
        if one.startswith("nvidia-")
    }
    # The compiler's wheel has programs and bitcode, no libraries to load.
    assert {f"{SITE}/nvidia/{one}/lib" for one in folders - {"cuda_nvcc"}} <= set(found)
    assert environment["XLA_FLAGS"] == f"--xla_gpu_cuda_data_dir={SITE}/nvidia/cuda_nvcc"
    assert f"{SITE}/nvidia/cuda_nvcc/bin" in environment["PATH"]


def test_the_page_says_that_the_images_were_not_built() -> None:
    text = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    for path in DOCKERFILES:
        assert f"configs/docker/{path.name}" in text
    assert "not built" in text


# The page


def commands() -> list[list[str]]:
    """Beam's options of every command of the page, as a shell would pass them."""
    text = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    scripts = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    logical = [line for script in scripts for line in _lines(script) if line.startswith("kith ")]
    words = [shlex.split(line) for line in logical]
    return [line[line.index("--") + 1 :] for line in words if "--" in line]


def _lines(script: str) -> list[str]:
    """The commands of a script; a quoted string may go over lines."""
    found, rest = [], ""
    for line in script.replace("\\\n", " ").splitlines():
        rest = f"{rest}\n{line}" if rest else line
        if rest.count("'") % 2 == 0:
            found.append(rest)
            rest = ""
    return found


def test_the_options_that_the_page_names_are_beams() -> None:
    from apache_beam.options import pipeline_options

    module = ast.parse(Path(pipeline_options.__file__).read_text("utf-8"))
    known = {
        node.value
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and str(node.value).startswith("--")
    }
    named = {option.partition("=")[0] for options in commands() for option in options}
    assert {"--sdk_container_image", "--environment_config", "--flink_master"} <= named
    assert sorted(named - known) == []


def test_the_job_for_dataflow_has_the_image_and_the_accelerator() -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    (options,) = [one for one in commands() if "--runner=DataflowRunner" in one]
    text = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    hints = dict(re.findall(r"^    (accelerator|min_ram): \"?([^\"\n]+)\"?$", text, re.MULTILINE))
    pipeline = beam.Pipeline(options=PipelineOptions([*options, "--dry_run=True"]))
    work = beam.Map(str).with_resource_hints(**hints)
    _ = pipeline | beam.Create([1]) | "Work" >> work
    pipeline.run()
    (environment,) = [
        one
        for one in pipeline.runner.proto_pipeline.components.environments.values()
        if one.resource_hints
    ]
    assert environment.urn == "beam:env:docker:v1"
    image = next(one for one in options if one.startswith("--sdk_container_image="))
    assert image.partition("=")[2].encode() in environment.payload
    accelerator = environment.resource_hints["beam:resources:accelerator:v1"]
    assert accelerator == b"type:nvidia-l4;count:1;install-nvidia-driver"
    assert environment.resource_hints["beam:resources:min_ram_bytes:v1"] == b"24000000000"
    # Nothing of Beam is installed on a worker: the image has it.
    staged = b"".join(artifact.role_payload for artifact in environment.dependencies)
    assert b"apache_beam" not in staged
