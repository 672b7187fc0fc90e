"""The committed sample through the default configuration: what a new user sees."""

from pathlib import Path

from pipelines.nightly import run_nightly
from tests.pipeline.small_catalogue import load, session

ROOT = Path(__file__).parents[2]


def test_the_sample_finds_other_drawings_of_the_same_object(tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "local.yaml", f"workspace={tmp_path / 'w'}")
    run = run_nightly(config, session()).run
    assert run["images"]["read"] == 1902
    assert run["images"]["failed_by_reason"] == {"empty": 1, "truncated": 1, "unsupported_format": 1}
    assert run["index"]["shards"] == 4
    assert run["truth"]["queries"] == 1890
    assert run["truth"]["hit_rate_at_1"] >= 0.43
    assert run["truth"]["hit_rate_at_k"] >= 0.78
    assert run["recall"]["lower_bound"] >= 0.95
    assert run["join"]["pairs"] == run["join"]["queries"] * 20
