"""The fuzzing of decoding, with other examples each time and for longer than CI has time for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZ = "tests/unit/test_decode_fuzz.py"
EXAMPLES = os.environ.get("KITH_FUZZ_EXAMPLES", "20000")


@pytest.mark.timeout(0)
def test_decoding_of_damaged_files(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--override-ini", "timeout=0", FUZZ]
    environment = os.environ | {"KITH_FUZZ_EXAMPLES": EXAMPLES}
    with capfd.disabled():
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0
