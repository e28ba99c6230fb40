"""A server of your own that scores: 1 for the right number, 0.1 for any number.

python examples/your_own/server.py 8000
sfpo-megatron train CONFIG reward.function=http reward.http.url=http://127.0.0.1:8000/
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(response: str, prompt: dict) -> dict[str, float]:
    text = response.rpartition("Answer:")[2].strip()
    is_number = text.removeprefix("-").isdecimal()
    is_right = text == prompt["answer"].strip()
    return {"reward": 1.0 if is_right else 0.1 * is_number, "number": is_number}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [score(*pair) for pair in zip(asked["responses"], asked["prompts"], strict=True)]
        body = json.dumps(scores).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing of each batch."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
