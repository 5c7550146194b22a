"""A reward service: `python service.py COMMAND ...` answers on a free port of 127.0.0.1 as long as the command runs.

The command finds the address in SCORE_URL and the key that it must send in SCORE_KEY. A judge or a reward model would stand where
`score` is; it may as well run on another machine.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = secrets.token_hex(16)


def score(item: dict[str, str]) -> float:
    """Of {"prompt", "response", "answer", "prompt_id"}: short answers are better, and nothing is given for an empty one."""
    length = len(item["response"].strip())
    return 0.0 if length == 0 else max(0.0, 1.0 - length / 64)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        if not secrets.compare_digest(self.headers.get("Authorization", ""), f"Bearer {KEY}"):
            return self.send_error(401)
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        body = json.dumps({"rewards": [score(item) for item in items]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, format: str, *args: object) -> None:
        return


def main() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/score"
        done = subprocess.run(sys.argv[1:], env={**os.environ, "SCORE_URL": address, "SCORE_KEY": KEY}, check=False)
        server.shutdown()
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
