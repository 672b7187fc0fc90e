"""The source that docs/adding.md writes as an example: it runs as it stands."""

import io
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from transforms.sources.base import ImageRecord, ImageSource, UnreadableRegion

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


@pytest.fixture
def zip_source(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class ZipSource, from the page."""
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (text,) = [example for example in examples if "class ZipSource" in example]
    module = types.ModuleType("zip_archive")
    # pydantic looks the module up by name.
    monkeypatch.setitem(sys.modules, "zip_archive", module)
    exec(compile(text, "zip_archive.py", "exec"), module.__dict__)
    return module.__dict__["ZipSource"]


def archive_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_the_example_source_reads_archives(zip_source: Any, tmp_path: Path) -> None:
    data = bytearray(archive_of({"a.jpg": b"first", "notes.txt": b"x", "d/b.PNG": b"second"}))
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "whole.zip").write_bytes(bytes(data))
    data[data.index(b"first")] ^= 1
    (folder / "damaged.zip").write_bytes(bytes(data))
    (folder / "cut.zip").write_bytes(bytes(data)[:-10])
    source: ImageSource = zip_source(format="zip", paths=str(folder / "*.zip"))
    shards = source.list_shards(0, "unused")
    assert [shard.name for shard in shards] == ["shop/cut.zip", "shop/damaged.zip", "shop/whole.zip"]
    cut, damaged, whole = [list(source.read(shard, {"brand": "string"})) for shard in shards]
    assert [type(item) for item in cut] == [UnreadableRegion]
    first, second = damaged
    assert isinstance(first, ImageRecord)
    assert first.error is not None
    assert (first.image_id, first.error.reason) == ("a.jpg", "corrupt_record")
    assert isinstance(second, ImageRecord)
    assert (second.image_id, second.row, second.data) == ("d/b.PNG", 1, b"second")
    assert [item.data for item in whole if isinstance(item, ImageRecord)] == [b"first", b"second"]
    assert source.fetch("shop/whole.zip", [1]) == {1: b"second"}
    assert source.fetch("shop/damaged.zip", [0, 1]) == {1: b"second"}
