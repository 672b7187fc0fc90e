"""Paths in a configuration: relative to where they were written."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from transforms.locations import CommandLineText, Location

LOCATION: TypeAdapter[str] = TypeAdapter(Location)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("a/b", "/base/folder/a/b"),
        ("./a//b/", "/base/folder/a/b"),
        ("../a", "/base/a"),
        (".", "/base/folder"),
        ("a/*/**/*.png", "/base/folder/a/*/**/*.png"),
        ("/absolute/a", "/absolute/a"),
        ("gs://bucket/a/../b", "gs://bucket/a/../b"),
        ("a b/ü", "/base/folder/a b/ü"),
    ],
)
def test_a_path_in_a_file_is_relative_to_the_base(value: str, wanted: str) -> None:
    assert LOCATION.validate_python(value, context={"base": "/base/folder"}) == wanted


def test_a_relative_base_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert LOCATION.validate_python("a", context={"base": "configs"}) == str(tmp_path / "configs/a")


def test_a_typed_path_is_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert LOCATION.validate_python(CommandLineText("a"), context={"base": "/base"}) == f"{tmp_path}/a"
    assert LOCATION.validate_python("a") == f"{tmp_path}/a"


def test_the_home_folder_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert LOCATION.validate_python("~/w", context={"base": "/base"}) == "/home/someone/w"


@pytest.mark.parametrize("value", ["", CommandLineText(""), 3, None])
def test_what_is_no_path_is_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        LOCATION.validate_python(value, context={"base": "/base"})
