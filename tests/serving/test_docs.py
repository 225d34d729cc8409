"""The commands of docs/serving.md, as they stand there."""

import json
import re
import shlex
import shutil
import subprocess

import pytest

from tests.serving.process import ROOT, Server

COMMANDS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_one_command_serves_and_answers_a_curl(models, tmp_path):
    shutil.copytree(models / "enforced", tmp_path / "law-and-medicine")
    serve = shlex.split(next(line for line in COMMANDS[0].splitlines() if "moe-fast serve" in line))
    assert serve[:2] == ["moe-fast", "serve"] and serve[-2:] == ["--port", "8000"]
    curl = next(block for block in COMMANDS if block.startswith("curl "))
    with Server(*serve[2:-2], folder=tmp_path) as server:  # on a port that is free
        command = shlex.split(curl.replace("\\\n", " ").replace("127.0.0.1:8000", server.address))
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [len(row["embedding"]) for row in answer["data"]] == [32, 32]
    assert answer["model"] == "law-and-medicine"
