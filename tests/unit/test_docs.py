"""The documentation: up to date with the code, and without dead links."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from pipelines import cli, config_reference
from pipelines.config import Config
from pipelines.config_loading import load_config
from transforms import failures, pixel_rules
from transforms.sources.registry import FORMATS, AnySource

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(path.read_text("utf-8")) if kind == language]


def anchors(path: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    text = FENCE.sub("", path.read_text("utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def yaml_examples() -> list[tuple[str, str]]:
    return [(name(page), text) for page in PAGES for text in fences(page, "yaml")]


def commands() -> list[str]:
    return [
        command.name or str(command.callback.__name__)
        for command in cli.app.registered_commands
        if command.callback
    ]


def reasons_in_code() -> set[str]:
    """Every reason: the first argument of each ImageError, and the constants that name some."""
    text = "\n".join(path.read_text("utf-8") for path in (ROOT / "transforms").rglob("*.py"))
    literal = set(re.findall(r'ImageError\(\s*"(\w+)"', text))
    named = set(re.findall(r"ImageError\(\s*([A-Z_]+)\b", text))
    return (
        literal
        | {getattr(pixel_rules, constant) for constant in named}
        | {pixel_rules.TRUNCATED, pixel_rules.TOO_LARGE, pixel_rules.CORRUPT}
        | {failures.UNREADABLE_REGION}
    )


def test_configuration_reference_is_what_the_models_say() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert written == config_reference.describe_config(), (
        "docs/configuration.md is out of date; write it again with "
        "python -m pipelines.config_reference > docs/configuration.md"
    )


def test_every_key_has_a_description() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \|.*\| ([^|]*) \|$", config_reference.describe_config(), re.MULTILINE
    )
    keys = [key for key, _ in rows]
    assert {"workspace", "join.k", "images.sources[].features.image", "index.transform.dim"} <= set(
        keys
    )
    assert [key for key, text in rows if not text.strip()] == []


def test_every_default_of_the_reference_is_the_default_of_the_code(tmp_path: Path) -> None:
    (example,) = fences(ROOT / "docs" / "configuration.md", "yaml")
    values = yaml.safe_load(example)
    stated = Config.model_validate(values, context={"base": str(tmp_path)}).model_dump()
    del values["images"]["sources"]
    assert values.keys() == Config.model_fields.keys()
    for section, keys in values.items():
        if isinstance(keys, dict):
            known = Config.model_fields[section].annotation
            assert inspect.isclass(known)
            assert keys.keys() == known.model_fields.keys() - {"sources"}, section
    default = Config.model_validate({"workspace": "workspace"}, context={"base": str(tmp_path)})
    sources = stated["images"].pop("sources")
    expected = default.model_dump()
    expected["images"].pop("sources")
    assert stated == expected
    assert {source["format"] for source in sources} == FORMATS
    for source in sources:
        kind = TypeAdapter(AnySource).validate_python({k: source[k] for k in ("format", "paths")})
        assert kind.model_dump() | {"name": source["name"]} == source


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    broken = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_examples_are_found() -> None:
    pages = {page for page, _ in yaml_examples()}
    assert {"README.md", "docs/operations.md", "docs/adding.md", "docs/configuration.md"} <= pages


@pytest.mark.parametrize(("page", "text"), yaml_examples())
def test_yaml_examples_are_valid_configurations(page: str, text: str, tmp_path: Path) -> None:
    weights = yaml.safe_load(text).get("encoder", {}).get("weights", "imagenet")
    if weights.endswith(".keras"):
        # Only that the file is there is looked at, before any work.
        (tmp_path / weights).parent.mkdir(parents=True)
        (tmp_path / weights).write_bytes(b"")
    path = tmp_path / "config.yaml"
    path.write_text(text, "utf-8")
    config = load_config(str(path))
    assert config.images.sources, page


def test_every_command_is_documented() -> None:
    assert len(commands()) >= 9
    for page in ("README.md", "docs/contracts.md"):
        text = (ROOT / page).read_text("utf-8")
        assert [c for c in commands() if f"| `kith {c}` |" not in text] == [], page


def test_documented_commands_exist() -> None:
    known = set(commands())
    for page in PAGES:
        text = page.read_text("utf-8")
        assert set(re.findall(r"`kith ([a-z][a-z-]*)", text)) <= known, name(page)
        for script in fences(page, "bash"):
            assert set(re.findall(r"\bkith ([a-z][a-z-]*) ", script)) <= known, name(page)


def test_every_reason_of_a_failure_is_explained() -> None:
    reasons = reasons_in_code()
    assert {"missing_id", "empty", "too_large", "zero_vector", "unreadable_region"} <= reasons
    text = (ROOT / "docs" / "images.md").read_text("utf-8")
    assert [reason for reason in sorted(reasons) if f"`{reason}`" not in text] == []


def test_python_examples_compile() -> None:
    found = [(name(page), text) for page in PAGES for text in fences(page, "python")]
    assert found
    for page, text in found:
        compile(text, page, "exec")


def test_no_page_names_a_folder_of_a_developers_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|work|tmp|root)/", page.read_text("utf-8")), name(page)


def test_the_two_commands_come_first_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    title, fence = text.split("\n\n")[:2]
    assert title == "# Kith"
    assert re.findall(r"^make ([a-z-]+)", fence, re.MULTILINE) == ["run-local", "test"]
