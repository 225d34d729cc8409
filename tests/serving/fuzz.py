"""schemathesis on the server's OpenAPI description: ``python -m tests.serving.fuzz --seconds 300``.

It asks for whatever the description allows, and for what it does not, and fails at an answer that
the description does not have, such as 500. One check is left out: that all which fits the
description is accepted, for it cannot say which token ids a tokenizer makes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.serving.process import Server
from tests.serving.tiny import save_models


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=300)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        models = save_models(Path(folder))
        with Server(str(models / "enforced"), "--body-timeout", "5") as server:
            command = [
                str(Path(sys.executable).with_name("schemathesis")),
                *("run", f"http://{server.address}/openapi.json"),
                *("--max-time", str(seconds), "--max-examples", "100000", "--checks", "all"),
                *("--exclude-checks", "positive_data_acceptance", "--continue-on-failure"),
                *("--generation-database", "none", "--request-timeout", "60"),
            ]
            failed = subprocess.run(command, cwd=folder).returncode
            status, _ = server.ask("w1")
    print(f"schemathesis ended with {failed}; the server then answered {status}")
    return failed or status != 200


if __name__ == "__main__":
    sys.exit(main())
