"""The recipe of the README from the command line, on Flower: MiniLM, ten clients, Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_fedcore_run_on_flower_leaves_the_local_engines_adapter(tmp_path):
    for engine in ("flower", "local"):
        command = f"run bbc-news --engine {engine} --rounds 2 --out {tmp_path / engine}"
        done = subprocess.run(
            [sys.executable, "-c", "from fedcore.cli import main; main()", *command.split()],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
                # Other tests run beside it; Ray's processes would stand back for them.
                "RAY_worker_niceness": "0",
            },
        )
        assert done.returncode == 0, done.stderr
        assert "held-out accuracy" in done.stdout
    files = sorted((tmp_path / "local").glob("adapter*/*.safetensors"))
    assert len(files) == 2
    for file in files:
        twin = tmp_path / "flower" / file.relative_to(tmp_path / "local")
        assert file.read_bytes() == twin.read_bytes(), file
    assert (tmp_path / "flower" / "report.html").is_file()
