"""docs/library.md: its examples run as they stand, where Beam and TensorFlow cannot be imported."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "library.md"
FORBIDDEN = ("apache_beam", "tensorflow", "tensorflow_io", "keras", "transforms", "pipelines")
# A module that is None cannot be imported.
PRELUDE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in {FORBIDDEN!r}:
    sys.modules[name] = None
"""


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_examples_run_without_beam_and_tensorflow(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).normal(size=(300, 32)).astype(np.float32)
    vectors[100:200] = vectors[:100] + 0.01 * vectors[200:]
    table = pa.table(
        {
            "sku": [f"sku-{row}" for row in range(300)],
            "vector": list(vectors),
            "brand": [f"brand-{row % 7}" for row in range(300)],
        }
    )
    pq.write_table(table, tmp_path / "vectors.parquet")
    first, second = examples()
    lines = [line for line in first.splitlines() if line.strip()]
    assert len(lines) <= 13, "the page promises a dozen lines"
    result = run(first, tmp_path)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()
    # So few vectors are searched whole.
    assert printed[0] == "recall@10: 1.0000, at least 1.0000"
    assert len(printed) == 4
    # A query in the first two hundred has a near copy, which comes first.
    for line in printed[1:]:
        query = re.match(r"sku-(\d+) \['sku-(\d+)'", line)
        assert query, line
        number = int(query[1])
        if number < 200:
            assert int(query[2]) == (number + 100) % 200
    result = run(second, tmp_path)
    assert result.returncode == 0, result.stderr
    found = eval(result.stdout)
    assert sorted(row["query_id"] for row in found) == [f"new-{n}" for n in range(5)]
    assert all(len(row["neighbor_ids"]) == 3 for row in found)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_prelude_forbids(name: str, tmp_path: Path) -> None:
    result = run(f"import {name}", tmp_path)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr
