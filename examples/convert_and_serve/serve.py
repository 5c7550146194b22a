"""An exported INT4 folder behind HTTP: `python serve.py DIR PORT`, then POST {"prompt": ..} gives {"text": ..}.

transformers loads the folder through compressed-tensors, as any folder of that format. On a GPU a server of an engine takes its
place: `python -m sglang.launch_server --model-path DIR`.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: Path) -> tuple[Any, Any]:
    """(tokenizer, model), on this machine's CPU. No code of the folder is run."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def answer(tokenizer: Any, model: Any, prompt: str, max_tokens: int = 32) -> str:
    """Greedy."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(input_ids=inputs.input_ids, max_new_tokens=max_tokens, do_sample=False)
    text: str = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


class Handler(BaseHTTPRequestHandler):
    tokenizer: Any
    model: Any

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        body = json.dumps({"text": answer(self.tokenizer, self.model, prompt)}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    Handler.tokenizer, Handler.model = load(Path(sys.argv[1]))
    server = HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
