"""What is checked before any work: environment, sources, workspace."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest

from index_builder.errors import ConfigError, KithError
from pipelines.config import Config
from pipelines.config_loading import load_config
from pipelines.preflight import (
    PACKAGES,
    RECORDED,
    check_environment,
    check_inputs,
    check_workspace,
    kith_version,
    recorded_versions,
    require_sources,
)
from tests.unit.test_exclusions import write_pairs


def config_of(tmp_path: Path, text: str) -> Config:
    (tmp_path / "kith.yaml").write_text(text)
    return load_config(str(tmp_path / "kith.yaml"))


def test_this_environment_is_fine() -> None:
    check_environment()


@pytest.mark.parametrize("package", PACKAGES)
def test_another_owner_of_a_package_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    info = tmp_path / "rival_tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival-tools\nVersion: 1.0\n")
    (info / "top_level.txt").write_text(f"{package}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KithError) as caught:
        check_environment()
    assert str(caught.value) == (
        f"The package name {package!r} is also used by rival-tools in this environment, so one of the "
        "two would be imported in place of the other. Install kith-index into an environment of its "
        "own."
    )


@pytest.mark.parametrize("version", [(3, 10, 14), (3, 13, 0)])
def test_another_python_is_refused(monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(KithError, match=r"Kith needs 3\.11 or 3\.12 .* Make a virtual environment"):
        check_environment()


def test_a_workspace_is_made_and_left_empty(tmp_path: Path) -> None:
    workspace = tmp_path / "a" / "b c"
    check_workspace(str(workspace))
    assert workspace.is_dir()
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(("below", "error"), [("file", "File exists"), ("file/w", "Not a directory")])
def test_a_workspace_that_cannot_be_written_is_refused(tmp_path: Path, below: str, error: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError) as caught:
        check_workspace(f"{tmp_path}/{below}")
    assert str(caught.value) == (
        f"workspace: cannot write to {tmp_path}/{below}: {error}. Choose a folder that this user may "
        "write to."
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_workspace_of_someone_else_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_workspace(str(tmp_path))


def test_embedding_needs_sources(tmp_path: Path) -> None:
    config = config_of(tmp_path, "workspace: w\n")
    for check in (require_sources, check_inputs):
        with pytest.raises(ConfigError) as caught:
            check(config)
        assert str(caught.value) == (
            "images.sources: missing. Embedding needs at least one source of images; "
            "configs/local.yaml of the repository shows two. Of datasets that were made elsewhere name "
            "the folders: --embeddings, --index, --neighbors."
        )
    assert not (tmp_path / "w").exists()


def test_every_source_is_looked_at_before_the_workspace_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    text = (
        "workspace: w\nimages: {sources: [{format: files, paths: a.png}, "
        "{format: tfrecord, paths: none/*.tfrecord, name: shop}]}\n"
    )
    with pytest.raises(ConfigError, match=r"images\.sources \(shop\)\.paths: .*/none does not exist"):
        check_inputs(config_of(tmp_path, text))
    assert not (tmp_path / "w").exists()
    check_inputs(
        config_of(tmp_path, "workspace: w\nimages: {sources: [{format: files, paths: a.png}]}")
    )


def test_excluded_pairs_are_looked_at_before_the_workspace_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    text = "workspace: w\nimages: {sources: [{format: files, paths: a.png}]}\n"
    text += "join: {rules: {exclude: {paths: pairs.parquet}}}\n"
    with pytest.raises(ConfigError, match="join.rules.exclude.paths: no file matches"):
        check_inputs(config_of(tmp_path, text))
    write_pairs(tmp_path / "pairs.parquet", [("a", "b")])
    with pytest.raises(ConfigError, match="query_column: .* has 0 columns 'q'"):
        check_inputs(
            config_of(tmp_path, text.replace("pairs.parquet", "pairs.parquet, query_column: q"))
        )
    assert not (tmp_path / "w").exists()
    check_inputs(config_of(tmp_path, text))


def test_versions_that_decide_the_bytes_are_recorded() -> None:
    versions = recorded_versions()
    assert set(versions) == {"python", *RECORDED}
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert kith_version() == importlib.metadata.version("kith-index")
