"""OpenVINO reports its imports and uses to a server on the internet; Kith's use of it does not."""

import os
import subprocess
import sys
from pathlib import Path

# Whatever opens a connection or starts a process is told on the way out.
_PROGRAM = """
import sys
events = []

def audit(event, arguments):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        events.append((event, str(arguments)[:100]))

from transforms.encoders.engines.choice import EngineChoice
from transforms.encoders.family import EncoderSpec
from transforms.encoders.keras_runtime import import_keras
from transforms.encoders.registry import load_encoder
import_keras()
sys.addaudithook(audit)
spec = EncoderSpec("efficientnet_lite0", "random", input_size=(32, 32))
load_encoder(spec, 1, EngineChoice("openvino"))
assert "openvino" in sys.modules
print(events)
"""


def test_importing_it_and_loading_a_model_starts_nothing() -> None:
    # Under CI it keeps quiet by itself, so the test is not run under its name.
    quiet = ("CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={name: value for name, value in os.environ.items() if name not in quiet},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
