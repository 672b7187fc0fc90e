"""The command line: exit statuses, one JSON object, and texts that say what to do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from index_builder.datasets import manifests
from index_builder.datasets.manifests import Manifest, Part
from index_builder.errors import KithError
from index_builder.search import neighbors
from pipelines import cli
from pipelines.config import Config
from pipelines.publish import publish
from pipelines.runners import RunnerSpec
from pipelines.stage import Session
from tests.unit.images_for_tests import encode, picture
from tests.unit.records_for_tests import example, write_records

COMMANDS = [
    "nightly", "embed", "build", "groups", "join", "graph", "export", "evaluate", "search", "report",
    "check",
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with one good picture, in a folder of its own."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encode(picture(), "PNG"))
    path = tmp_path / "kith.yaml"
    path.write_text("workspace: w\nimages: {sources: [{format: files, paths: pictures/*}]}\n")
    return path


@pytest.fixture(autouse=True)
def process_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what the command line sets for the rest of its process."""
    monkeypatch.setattr(sys, "argv", sys.argv)


def run(*arguments: str | Path) -> int:
    """Runs the command line in this process and returns its exit status."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def run_process(
    *arguments: str | Path, script: tuple[str, ...] = ("-m", "pipelines.cli")
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a process of its own."""
    line = [sys.executable, *script, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def only_json(stdout: str) -> dict[str, Any]:
    """What was printed: one JSON object on one line, and nothing beside it."""
    assert stdout.count("\n") == 1
    assert stdout.endswith("\n")
    document = json.loads(stdout)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    captured = capsys.readouterr()
    assert f"kith {command}" in captured.out
    for option in ("--config", "--set", "--json"):
        assert option in captured.out
    assert captured.err == ""


def test_the_help_names_every_command_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(f" {command} " in text for command in COMMANDS)
    assert "Exit status: 0 done, 1 the run failed" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nightly"], "Missing option '--config'"),
        (["nightly", "--config"], "requires an argument"),
        (["nightli"], "No such command 'nightli'"),
        (["check", "--confg", "x"], "No such option: --confg"),
        (["search", "--config", "x"], "Missing argument 'IMAGE...'"),
        (["search", "a.png", "--config", "x", "--k", "0"], "Invalid value for '--k'"),
        (["nightly", "--config", "x", "extra"], "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "search"])
def test_a_wrong_configuration_ends_with_2(
    command: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--config", config, "--set", "join.kk=3", "--json") == 2
    captured = capsys.readouterr()
    document = only_json(captured.out)
    assert (document["command"], document["status"], document["exit_status"]) == (command, "failed", 2)
    assert document["error"]["kind"] == "ConfigError"
    assert "join.kk: unknown key. Did you mean 'k'?" in document["error"]["message"]
    assert captured.err.startswith(f"kith {command}: ")
    assert document["error"]["message"] in captured.err
    assert not (config.parent / "w").exists()


def test_a_missing_configuration_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("nightly", "-c", tmp_path / "none.yaml") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"kith nightly: The configuration file {tmp_path}/none.yaml does not exist. Give one with "
        "--config FILE; configs/local.yaml of the repository is a complete example.\n"
    )


@pytest.mark.parametrize("command", ["nightly", "embed", "check"])
def test_an_empty_catalogue_ends_with_1_before_any_work(
    command: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = "images.sources.0.paths=" + str(config.parent / "pictures" / "*.bmp")
    assert run(command, "--config", config, "--set", pattern, "--json") == 1
    document = only_json(capsys.readouterr().out)
    assert document["error"]["message"].startswith("The catalogue is empty: no file matches ")
    assert not (config.parent / "w").exists()


def test_a_missing_path_ends_with_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nightly", "--config", config, "--set", "images.sources.0.paths=/none/*", "--json") == 2
    message = only_json(capsys.readouterr().out)["error"]["message"]
    assert message.startswith("images.sources (none).paths: /none does not exist, wanted image files.")


@pytest.mark.parametrize("command", ["nightly", "embed", "check"])
def test_a_workspace_that_cannot_be_written_ends_with_2(
    command: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = f"workspace={config}/w"
    assert run(command, "--config", config, "--set", workspace) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"kith {command}: workspace: cannot write to {config}/w: Not a directory. Choose a folder that "
        "this user may write to.\n"
    )


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("build", "There is no embeddings dataset for this configuration in"),
        ("join", "There is no embeddings dataset for this configuration in"),
        ("export", "There is no embeddings dataset for this configuration in"),
        ("evaluate", "There is no embeddings dataset for this configuration in"),
        ("search", "Nothing is published in "),
        ("report", "Nothing is published in "),
    ],
)
def test_a_stage_whose_input_is_missing_ends_with_1(
    command: str, told: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [config.parent / "pictures" / "a.png"] if command == "search" else []
    assert run(command, *images, "--config", config, "--json") == 1
    error = only_json(capsys.readouterr().out)["error"]
    assert error["kind"] in ("DatasetError", "KithError")
    assert error["message"].startswith(told)
    assert "Run kith " in error["message"]


@pytest.mark.parametrize(
    "arguments", [["build", "--embeddings"], ["join", "--index"], ["export", "--neighbors"]]
)
def test_a_dataset_that_is_not_there_ends_with_1(
    arguments: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(config.parent / "no dataset")
    assert run(*arguments, folder, "--config", config, "--json") == 1
    error = only_json(capsys.readouterr().out)["error"]
    assert error["kind"] == "DatasetError"
    assert folder in error["message"]


def test_an_unknown_runner_ends_with_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["embed", "--config", config, "--json", "--", "--runner=FlonkRunner"]
    assert run(*line) == 2
    message = only_json(capsys.readouterr().out)["error"]["message"]
    assert message.startswith("runner: Beam cannot make a pipeline for 'FlonkRunner'")


@pytest.mark.parametrize(
    ("line", "own", "beam_options"),
    [
        ([], [], ()),
        (["nightly", "-c", "x"], ["nightly", "-c", "x"], ()),
        (["nightly", "--", "--runner=F", "--a"], ["nightly"], ("--runner=F", "--a")),
        (["nightly", "--", "--a", "--", "b"], ["nightly"], ("--a", "--", "b")),
        (["nightly", "--"], ["nightly"], ()),
    ],
)
def test_a_line_is_split_at_the_first_dashes(
    line: list[str], own: list[str], beam_options: tuple[str, ...]
) -> None:
    assert cli.split_beam_options(line) == (own, beam_options)


def test_what_stands_after_the_dashes_belongs_to_one_call(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []

    def refused(config: Config, session: Session, replay: str | None) -> None:
        told.append(session.runner)
        raise KithError("far enough")

    monkeypatch.setattr("pipelines.embed_images.embed_images", refused)
    assert run("embed", "--config", config, "--", "--runner=FlinkRunner", "--parallelism=2") == 1
    assert run("embed", "--config", config) == 1
    assert told == [
        RunnerSpec("DirectRunner", ("--runner=FlinkRunner", "--parallelism=2")),
        RunnerSpec("DirectRunner"),
    ]
    assert capsys.readouterr().err == "kith embed: far enough\n" * 2


def test_what_a_library_prints_stays_out_of_the_json(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(*_: object) -> dict[str, Any]:
        print("a greeting of a library")
        return {"image_shards": 1}

    monkeypatch.setattr("pipelines.check.check_everything", chatty)
    assert run("check", "--config", config, "--json") == 0
    captured = capsys.readouterr()
    assert only_json(captured.out)["image_shards"] == 1
    assert captured.err == "a greeting of a library\n"


def test_check_says_what_it_found(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "--config", config, "--json") == 0
    document = only_json(capsys.readouterr().out)
    assert document.pop("kith_version")
    assert document == {
        "command": "check",
        "status": "done",
        "workspace": str(config.parent / "w"),
        "image_shards": 1,
        "encoder": "efficientnet_lite0",
        "published_run": None,
    }
    assert run("check", "--config", config) == 0
    assert "image_shards" in capsys.readouterr().out


def test_check_data_verifies_every_published_file(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.parent / "w" / "neighbors" / "abc"
    folder.mkdir(parents=True)
    parts = []
    for number in range(3):
        (folder / f"p{number}.parquet").write_bytes(b"part %d" % number)
        file = manifests.describe_file(str(folder), f"p{number}.parquet")
        parts.append(Part(f"p{number}", "key", 1, (file,)))
    manifest = Manifest(neighbors.KIND, "f" * 64, {}, [], tuple(parts), {})
    manifests.commit(str(folder), manifest)
    publish(str(config.parent / "w"), "run-7", {neighbors.KIND: str(folder)})

    assert run("check", "--config", config, "--data", "--json") == 0
    document = only_json(capsys.readouterr().out)
    assert (document["published_run"], document["verified_files"]) == ("run-7", 3)

    (folder / "p1.parquet").write_bytes(b"Part 1")
    assert run("check", "--config", config, "--json") == 0
    capsys.readouterr()
    assert run("check", "--config", config, "--data", "--json") == 1
    error = only_json(capsys.readouterr().out)["error"]
    assert error["kind"] == "DatasetError"
    assert "p1.parquet" in error["message"]


def test_a_defect_of_ours_is_called_one(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("pipelines.check.check_everything", broken)
    assert run("check", "--config", config, "--json") == 1
    captured = capsys.readouterr()
    error = only_json(captured.out)["error"]
    assert error["kind"] == "ZeroDivisionError"
    assert error["message"].startswith("Unexpected ZeroDivisionError: a defect. ")
    assert "--verbose shows where it happened" in error["message"]
    assert "Traceback" not in captured.err
    assert run("check", "--config", config, "--verbose") == 1
    assert "in broken\n" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.check.check_everything", interrupted)
    assert run("check", "--config", config, "--json") == 130
    captured = capsys.readouterr()
    assert only_json(captured.out)["exit_status"] == 130
    assert captured.err == "kith check: Interrupted. Run the same command again to go on.\n"


def test_a_catalogue_in_which_every_image_fails_ends_with_1(tmp_path: Path) -> None:
    records = [example(image_id=f"i{n}", image__encoded=b"no image") for n in range(3)]
    write_records(tmp_path / "shop" / "a.tfrecord", [*records, example(image_id="i3")])
    config = tmp_path / "kith.yaml"
    config.write_text("workspace: w\nimages: {sources: [{format: tfrecord, paths: shop/*}]}\n")
    done = run_process("nightly", "--config", config, "--json")
    assert done.returncode == 1
    # TensorFlow and Beam are loaded by then, and neither may write between the lines.
    document = only_json(done.stdout)
    assert document["error"]["kind"] == "KithError"
    message = document["error"]["message"]
    assert message.startswith(
        "Every one of the 4 images failed (missing_image 1, unsupported_format 3), wanted at least one "
        f"embedding. Look at {tmp_path}/w/failures/"
    )
    assert done.stderr.endswith(f"kith nightly: {message}\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w" / "current.json").exists()


def test_the_command_runs_as_a_process_of_its_own(config: Path) -> None:
    entry = Path(sys.executable).parent / "kith"
    for script in (("-m", "pipelines.cli"), (str(entry),)):
        done = run_process("check", "--config", config, "--json", script=script)
        assert done.returncode == 0, done.stderr
        assert only_json(done.stdout)["status"] == "done"
        assert done.stderr == ""


def test_verbose_shows_where_an_error_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_process("check", "--config", tmp_path / "none.yaml", "--verbose", "--json")
    assert done.returncode == 2
    assert only_json(done.stdout)["exit_status"] == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "index_builder.errors.ConfigError: The configuration file" in done.stderr
