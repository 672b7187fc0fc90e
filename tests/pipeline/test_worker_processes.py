"""The local runner with worker processes of its own, one a GPU, as docs/gpu.md starts them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.killed_work import Tiny
from tests.pipeline.small_catalogue import dataset_bytes, load, session

ROOT = Path(__file__).parents[2]


def options_of_the_page() -> list[str]:
    """Beam's options of the page's command for several GPUs, with two of them."""
    text = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    found = re.search(r"^kith embed [^\n]*(--direct_num_workers=.*?)^kith nightly", text, re.M | re.S)
    assert found
    return shlex.split(found[1].replace("\\\n", " ").replace("=$GPUS", "=2"))


@pytest.mark.timeout(120)
def test_two_workers_see_a_gpu_each_and_give_the_same_bytes(tmp_path: Path) -> None:
    from pipelines.embed_images import embed_images

    tiny = Tiny.make(tmp_path / "tiny", shards=6, images=60)
    embed_images(load(tiny.write_config(tmp_path / "one.yaml", tmp_path / "one")), session())
    config = tiny.write_config(tmp_path / "two.yaml", tmp_path / "two")
    options = options_of_the_page()
    place = next(n for n, one in enumerate(options) if one.startswith("--environment_config="))
    seen = shlex.quote(str(tmp_path / "seen"))
    worker = options[place].replace(
        "exec ", f'echo "$WORKER_ID $CUDA_VISIBLE_DEVICES" >> {seen}; exec '
    )
    assert worker != options[place]
    command = [sys.executable, "-m", "pipelines.cli", "embed", "--config", str(config), "--"]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        [*command, *options[:place], worker, *options[place + 1 :]],
        env=os.environ | {"PATH": path, "GPUS": "2"},
        cwd=ROOT, capture_output=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    workers = dict(line.split() for line in (tmp_path / "seen").read_text().splitlines())
    assert len(workers) == 2
    assert set(workers.values()) == {"0", "1"}
    assert dataset_bytes(tmp_path / "two") == dataset_bytes(tmp_path / "one")
