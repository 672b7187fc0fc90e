"""What `kith join` loads before it begins: its start is a part of every short join."""

import subprocess
import sys


def test_a_join_loads_no_network_library() -> None:
    code = (
        "import sys\n"
        "import pipelines.cli, pipelines.config_loading, pipelines.join_neighbors\n"
        "import transforms.neighbors\n"
        "assert 'apache_beam' in sys.modules\n"
        "assert not {'keras', 'tensorflow', 'h5py', 'openvino', 'torch'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
