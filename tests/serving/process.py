"""``moe-fast serve`` as a process of its own."""

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "moe_fast_cli.py"), "serve"]


class Server:
    """A server's process, its address and what it has logged; it ends with the block.

    Args:
        options: of the command, but the port, which is a free one.
        folder: the working folder.
    """

    def __init__(self, *options, folder=ROOT):
        self.log = []
        self.address = None
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *options],
            cwd=folder,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self):
        listening = threading.Event()

        def read():
            for line in self.process.stdout:
                self.log.append(line)
                found = re.search(r"http://(127\.0\.0\.1:[1-9]\d*)", line)
                if found:
                    self.address = found[1]
                    listening.set()
            listening.set()

        threading.Thread(target=read, daemon=True).start()
        if not listening.wait(300) or self.address is None:
            self.__exit__()
            raise RuntimeError("".join(self.log))
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def ask(self, texts):
        """POST a request for embeddings; return the answer's status and JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        body = {"model": "enforced", "input": texts, "domain": "law"}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/embeddings", body=json.dumps(body), headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
