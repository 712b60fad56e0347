"""A small OpenAI-compatible server as a process of its own: `python serving.py stream` prints its port, then serves.

stream: sends its answer in pieces, unasked; plain: in one. refuse: knows one key, 401 to others. busy: 429 twice, then
an answer. cut: closes the connection in the middle of a stream, twice. silent: an answer without a name.
"""

import http.server
import json
import sys

ANSWER = "There are 3 such categories:\n- kite\n- 2. paper dart\n- leaf"
KEY = "Bearer secret-123"
STATE = {"asked": 0}


class Handler(http.server.BaseHTTPRequestHandler):
    way = ""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["temperature"] == 0 and body["messages"]
        STATE["asked"] += 1
        if self.way == "refuse" and self.headers.get("Authorization") != KEY:
            return self.send_error(401)
        if self.way == "busy" and STATE["asked"] < 3:
            self.send_response(429)
            self.send_header("Retry-After", "0")
            return self.end_headers()
        if self.way in ("stream", "cut"):
            return self.stream(cut=self.way == "cut" and STATE["asked"] < 3)
        text = "I cannot say." if self.way == "silent" else ANSWER
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def stream(self, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        deltas = [{"role": "assistant"}, *({"content": ANSWER[i : i + 7]} for i in range(0, len(ANSWER), 7))]
        for number, delta in enumerate(deltas):
            if cut and number == 4:
                return
            self.wfile.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    Handler.way = sys.argv[1]
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
