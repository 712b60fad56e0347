"""What an endpoint, its key and the kept answers can do wrong; how many questions are asked."""

import http.server
import json
import threading

from lab import runs
from lab.runs import UserError

import pytest
from test_envision import endpoint

import envision
from names import asking, prompts, providers


class Odd(http.server.BaseHTTPRequestHandler):
    """Redirects elsewhere, promises more than it sends, or answers in no JSON object."""

    way = ""
    keys: list = []

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).keys.append(self.headers.get("Authorization"))
        if self.way == "redirect":
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        elif self.way == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
        elif self.way == "slow":
            threading.Event().wait(0.6)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.way.encode())

    do_GET = do_POST

    def log_message(self, *args):
        pass


ODD = [
    ("redirect", r"HTTP 302"),
    ("cut", r"no answer \(IncompleteRead\) 3 times"),
    ("slow", r"no answer .* 3 times"),
    *((text, "malformed JSON 3 times") for text in ("null", "7", '{"choices": 1}', '{"choices": [[]]}', "[" * 99_999)),
    ('{"choices": [{"message": {"content": null}}]}', "an empty answer 3 times"),
]


@pytest.mark.parametrize(("way", "word"), ODD, ids=lambda x: x[:30])
def test_odd_servers_end_in_one_line(way, word, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret-123")
    Odd.way, Odd.keys = way, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        asked = providers.Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "m", "TEST_KEY", 0.3, 2, 0.01)
        with pytest.raises(UserError, match=word) as caught:
            asked.complete([])
    finally:
        server.shutdown()
        server.server_close()
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(Odd.keys) == (1 if way == "redirect" else 3)  # the key followed no redirect


def test_odd_keys_and_addresses(monkeypatch):
    monkeypatch.setenv("TEST_KEY", " secret-123\r\n")
    assert endpoint("http://127.0.0.1:9")._key == "secret-123"
    for bad in ("secret\n123", "secret-ключ"):
        monkeypatch.setenv("TEST_KEY", bad)
        with pytest.raises(UserError, match=r"\$TEST_KEY holds characters") as caught:
            endpoint("http://127.0.0.1:9")
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("TEST_KEY", "")
    with pytest.raises(UserError, match="user or password") as caught:
        endpoint("http://me:secret@127.0.0.1:9/v1")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="no address that can be asked"):
        endpoint("http://127.0.0.1:port/v1").complete([])


def command(monkeypatch, tmp_path, *more: str) -> None:
    (tmp_path / "ids.txt").write_text("owl\nbat\n")
    argv = [
        "--id",
        tmp_path / "ids.txt",
        "--url",
        "http://127.0.0.1:9",
        "--out",
        tmp_path / "made.json",
        "--model",
        "m",
    ]
    monkeypatch.setattr("sys.argv", ["envision.py", *map(str, argv), *more])
    envision.main()


@pytest.mark.parametrize("more", [["--n", "0"], ["--retries", "-1"], ["--timeout", "0"]])
def test_odd_options_of_envision(more, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--n is at least 1, --retries at least 0, --timeout at least 0.1"):
        command(monkeypatch, tmp_path, *more)


def test_kept_answers_that_were_edited_or_are_held(monkeypatch, tmp_path):
    about = {"id": str(tmp_path / "ids.txt"), "task": "far", "variant": "resemble", "n": 50, "model": "m"}
    raw = tmp_path / "made.answers.json"
    for answers in (None, [], {"all": "x"}, {"all": [1]}, {"all": [{"answer": 3}]}):
        raw.write_text(json.dumps({"about": about, "answers": answers}))
        with pytest.raises(UserError, match="is damaged"):
            command(monkeypatch, tmp_path, "--n", "50")
    for other in ([], {"about": {**about, "n": 7}}):
        raw.write_text(json.dumps(other))
        with pytest.raises(UserError, match="another question"):
            command(monkeypatch, tmp_path, "--n", "50")
    raw.write_text('{"about"')
    with pytest.raises(UserError, match="not valid JSON"):
        command(monkeypatch, tmp_path, "--n", "50")
    lock = envision._alone(tmp_path / "made.json")
    with pytest.raises(UserError, match="another process is writing"):
        command(monkeypatch, tmp_path, "--n", "50")
    lock.close()
    # With every answer there nothing is asked, and the names are made from what was kept.
    raw.write_text(json.dumps({"about": about, "answers": {"all": [{"answer": "- kite\n- owl"}]}}))
    command(monkeypatch, tmp_path, "--n", "50")
    assert runs.read_json(tmp_path / "made.json")["names"] == ["kite", "owl"]


@pytest.mark.parametrize(("n", "turns"), [(1, 1), (50, 1), (51, 2), (100, 2), (300, 6), (500, 10)])
def test_number_of_turns(n, turns):
    """L / 50 - 1 follow-ups; a number that is no multiple of 50 is rounded up, so that nothing asked for is missing."""
    asked = []

    class Count:
        name = "count"

        def complete(self, messages, q):
            asked.append((len(messages), messages[0]["content"], q.n))
            return "- x"

    asking.envision(Count(), ["owl"], "far", n)
    assert [m for m, *_ in asked] == [2 * i + 1 for i in range(turns)]
    assert f"name {min(n, 50)} classes" in asked[0][1]


def test_near_asks_once_for_each_distinct_name():
    class Count:
        name, seen = "count", []

        def complete(self, messages, q):
            self.seen.append(q.id_names)
            return "- x"

    made = asking.envision(Count(), ["missile", "owl", "missile"], "near", 3)
    assert Count.seen == [("missile",), ("owl",)] and [*made] == ["missile", "owl"]


def test_the_examples_always_show_three_answers():
    text = prompts.prompt(prompts.Question("near", "resemble", ("owl",), 10))
    assert text.count("There are 3 such categories:") == 3 and text.endswith("There are 10 such categories:")


@pytest.mark.parametrize("variant", ["resemble", "dissimilar", "irrelevant"])
@pytest.mark.parametrize("task", ["far", "fine"])
def test_a_conversation_keeps_its_demand(task, variant):
    """Question, answer, follow-up, answer, follow-up: in this order, and each turn asks for the same kind of names."""
    seen = []

    class Count:
        name = "count"

        def complete(self, messages, q):
            seen.append(messages)
            return f"- answer {len(seen)}"

    asking.envision(Count(), ["owl", "bat"], task, 150, variant, "bird")
    last = seen[-1]
    assert [m["role"] for m in last] == ["user", "assistant"] * 2 + ["user"]
    assert [m["content"] for m in last[1::2]] == ["- answer 1", "- answer 2"]
    assert "owl, bat" in last[0]["content"] and not any("owl, bat" in m["content"] for m in last[2::2])
    demand = prompts.DEMAND[variant] if task == "far" else prompts.FINE_DEMAND.get(variant, "bird species")
    assert all(demand in m["content"] for m in last[::2])
    known, answer = prompts.EXAMPLES[task, variant]
    assert known in last[0]["content"] and all(f"- {x}" in last[0]["content"] for x in answer.split(", "))
    other = {prompts.EXAMPLES[task, v][1] for v in ("resemble", "dissimilar", "irrelevant")}
    assert len(other) == 3 and len(answer.split(", ")) == (5 if task == "far" else 10)
