"""Prompts, reading of answers, cleaning, and the endpoint against a local server that speaks the API."""

import http.server
import json
import os
import threading
from pathlib import Path

from lab import runs
from lab.runs import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import envision
from names import asking, prompts, providers, reading
from names.prompts import Question
from names.reading import clean, read_answers
from standins import drawn


def test_prompts_show_only_id_names():
    q = Question("far", "resemble", ("tabby", "pug"), 50)
    assert "tabby, pug" in prompts.prompt(q) and "50 classes" in prompts.prompt(q)
    near = prompts.prompt(Question("near", "resemble", ("aquarium_fish",), 3))
    assert "aquarium fish" in near and near.endswith("There are 3 such categories:")
    fine = prompts.prompt(Question("fine", "resemble", ("robin",), 50, "bird"))
    assert "species of bird: robin" in fine and "NOT in the data set" in fine
    for task in ("far", "near", "fine"):
        texts = {prompts.prompt(Question(task, v, ("robin",), 3)) for v in ("resemble", "dissimilar", "irrelevant")}
        assert len(texts) == 3
    assert "three words" in prompts.follow_up(q)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("- gray wolf", "gray wolf"),
        ("  * **Red Panda**", "Red Panda"),
        ("1. ginkgo tree.", "ginkgo tree"),
        ("12) river", "river"),
        ("• “black stone”", "black stone"),
        ("- moon: a round object", "moon"),
        ("- Ginkgo (a tree)", "Ginkgo"),
        ("- kite – flies", "kite"),
        ("-no space", "no space"),
        ("- naïve café\r", "naïve café"),
        ("- T-shirt", "T-shirt"),
        ("- `code`", "code"),
        ("- 1. Snow leopard", "Snow leopard"),
        ("* 12) **Red fox**", "Red fox"),
        ("1. - barn owl", "barn owl"),
        ("- 3.5 mm jack", "3.5 mm jack"),
        ("- 747", "747"),
    ],
)
def test_ugly_lines(line, name):
    assert read_answers([line]).names == [name]


def test_answers_that_are_no_text_are_dropped_and_counted():
    for faithful in (False, True):
        read = read_answers([None, "- owl", 7], faithful)
        assert read.names == ["owl"] and read.dropped == {"no text": 2}
    assert read_answers([]).names == []


def test_dropped_lines_are_counted():
    read = read_answers(
        ["Sure! Here they are:\n\n- a\n- \n- ***\n- " + "x" * 70 + "\n- one two three four five six seven eight nine"]
    )
    assert read.names == ["a"]
    assert read.dropped == {"no list item": 1, "empty": 2, "too long": 2}
    assert read_answers([""]).names == [] and read_answers([]).names == []


def test_faithful_reading_fuses_answers_and_keeps_spaces():
    answers = ["- a\n- Spaceship", "- Skateboard\n1. lost\n-lost\n - lost\n- b "]
    read = read_answers(answers, faithful=True)
    assert read.names == ["a", "Spaceship- Skateboard", "b "]
    assert read.dropped == {"no hyphen": 3}
    assert read_answers(answers).names == ["a", "Spaceship", "Skateboard", "lost", "lost", "lost", "b"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=5))
def test_reading_survives_anything(answers):
    for faithful in (False, True):
        read = read_answers(answers, faithful)
        assert all(isinstance(n, str) for n in read.names)
    names = read_answers(answers).names
    assert all(n.strip() == n and n and n.isprintable() and len(n) <= reading.LETTERS_MOST for n in names)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abC dé", max_size=8), max_size=12), st.lists(st.text("abC d", max_size=8), max_size=4))
def test_cleaning_is_idempotent_and_excludes_id_names(names, ids):
    read = clean(names, ids, "far")
    assert not {*read.names} & {i.lower() for i in ids}
    assert len(read.names) == len({*read.names}) and {*read.names} == {n.lower() for n in names} - {
        i.lower() for i in ids
    }
    assert len(read.names) + sum(read.dropped.values()) == len(names)
    assert clean(read.names, ids, "far").names == read.names


def test_word_rule_is_for_near_and_case_sensitive_on_one_side():
    ids = ["Siamese cat", "horse"]
    assert clean(["siamese twin", "wild cat", "Horse cart", "deer"], ids, "near").names == ["siamese twin", "deer"]
    assert clean(["wild cat"], ids, "near", "irrelevant").names == ["wild cat"]
    assert clean(["wild cat", "HORSE"], ids, "far").names == ["wild cat"]
    read = clean(["Owl", "bat", "owl", "OWL", "Horse"], ids, "far")
    assert read.names == ["owl", "bat"] and read.dropped == {"repeated": 2, "ID name": 1}


def test_conversation_asks_follow_ups_and_goes_on(tmp_path):
    provider = drawn.RuleProvider(0)
    ids = drawn.concepts()[:5]
    saved: list[dict] = []
    full = asking.envision(provider, ids, "fine", 150, save=lambda a: saved.append(json.loads(json.dumps(a))))
    turns = full["all"]
    assert len(turns) == 3 and len(saved) >= 3  # 50 + 2 x 50
    assert all({"model", "time", "prompt", "answer"} <= {*t} for t in turns)
    names = [n for t in turns for n in read_answers([t["answer"]]).names]
    assert len(names) == len({*names}) and not {*names} & {*ids}
    again = asking.envision(None, ids, "fine", 150, kept=full)  # nothing is asked again
    assert again == full


def test_name_files(tmp_path):
    path = tmp_path / "n.json"
    path.write_text(json.dumps({"a": ["x", "y"], "b": ["z"]}))
    assert reading.read_names(path).take("near", 1) == ["x", "z"]
    path.write_text(json.dumps({"names": ["p", "q"], "made_by": "me"}))
    assert reading.read_names(path).take("far", 1) == ["p"] and reading.read_names(path).made_by == "me"
    path.write_text(json.dumps({"names": ["  snow  leopard\n", "owl "]}))
    assert reading.read_names(path).groups == {"all": ["snow leopard", "owl"]}
    path.write_text(
        json.dumps({"owl": ["lizard "]})
    )  # published lists keep their blanks: the printed numbers have them
    assert reading.read_names(path).groups == {"owl": ["lizard "]}
    for bad in ("[1]", '{"a": 1}', '{"a": [1]}', "{", '{"names": ["owl", " "]}', '[""]'):
        path.write_text(bad)
        with pytest.raises(UserError):
            reading.read_names(path)


def test_the_layout_of_name_files_keeps_what_they_say():
    value = {"n": 3, "names": ["a b", 'say "x"', "ü"] * 40, "by": {"k": ["x"] * 30, "l": []}, "none": [], "d": None}
    text = reading.layout(value)
    assert json.loads(text) == value and len(text.splitlines()) < 30
    assert max(map(len, text.splitlines())) < 150 + 30 * 5


class Stubborn:
    """Answers without a name until it is asked again; `deaf`: then, too."""

    def __init__(self, deaf=(), continues=False):
        self.name, self.deaf, self.continues, self.seen = "stubborn", deaf, continues, []

    def complete(self, messages, q):
        self.seen.append(messages)
        if "form that is shown" not in messages[0]["content"] or q.id_names[0] in self.deaf:
            return "Sure, what an interesting question!"
        return " kite\n- leaf" if self.continues else "- kite\n- leaf"


@pytest.mark.parametrize("continues", [False, True])
def test_an_answer_without_a_name_is_asked_again(continues):
    provider = Stubborn(continues=continues)
    made = asking.envision(provider, ["owl"], "near", 3)
    assert read_answers([made["owl"][0]["answer"]]).names == ["kite", "leaf"]
    assert made["owl"][0]["refused"] == ["Sure, what an interesting question!"]
    first, second = provider.seen
    assert second[0]["content"].endswith(first[0]["content"]) and len(second[0]["content"]) > len(first[0]["content"])
    last = {"role": "assistant", "content": "There are 3 such categories:\n-"}
    assert (second[-1] == last) == continues and len(second) == 1 + continues
    # A turn of an earlier start without a name is asked anew, one with names is not.
    kept = {"owl": [{"answer": "no names here"}]}
    assert read_answers([asking.envision(provider, ["owl"], "near", 3, kept=kept)["owl"][0]["answer"]]).names
    assert asking.envision(None, ["owl"], "near", 3, kept=made) == made


def test_a_conversation_ends_with_its_first_turn_without_a_name():
    answers = iter(["- a", "nothing", "nothing more"])

    class Tired:
        name = "tired"

        def complete(self, messages, q):
            return next(answers)

    assert [t["answer"] for t in asking.envision(Tired(), ["owl"], "far", 500)["all"]] == ["- a", "nothing more"]


def test_envision_without_a_single_name_stops_and_keeps_the_answers(monkeypatch, tmp_path):
    ids, out = tmp_path / "ids.txt", tmp_path / "made.json"
    ids.write_text("owl\nbat\n")
    argv = ["envision.py", "--id", ids, "--task", "near", "--n", "3", "--model", "m", "--out", out]
    monkeypatch.setattr("sys.argv", [str(a) for a in argv])
    monkeypatch.setattr(providers, "Endpoint", lambda *a: Stubborn(deaf=("bat",)))
    with pytest.raises(UserError, match=r"gave no name for bat \(1 of 2 conversations\), asked twice"):
        envision.main()
    assert not out.exists()
    kept = json.loads(out.with_suffix(".answers.json").read_text())["answers"]
    assert kept["owl"][0]["answer"] == "- kite\n- leaf" and kept["bat"][0]["refused"]
    monkeypatch.setattr(providers, "Endpoint", lambda *a: Stubborn())
    envision.main()  # asks for the one that is missing
    assert json.loads(out.read_text())["names"] == {"owl": ["kite", "leaf"], "bat": ["kite", "leaf"]}


def test_own_names_are_honest():
    """Every shipped list says who made it and holds names that survive cleaning."""
    files = sorted((runs.HERE / "envisioned").glob("*.json"))
    assert files
    for path in files:
        about = runs.read_json(path)
        assert about["made_by"] and about["prompt"] and about["date"]
        ids = data.id_names(about["id"])
        found = reading.read_names(path)
        left = clean([n for g in found.groups.values() for n in g], ids, about["task"], about["variant"])
        assert left.names, path
        if about["task"] == "near":
            assert {*found.groups} == {*ids}, path


# ------------------------------------------------------------------------------------------------------------ endpoint


class Server(http.server.BaseHTTPRequestHandler):
    script: list = []
    seen: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append((self.path, self.headers.get("Authorization"), body))
        step = type(self).script.pop(0) if type(self).script else (200, "- z")
        code, text = step
        reply = (
            text if code != 200 or text.startswith("RAW") else json.dumps({"choices": [{"message": {"content": text}}]})
        )
        self.send_response(code)
        self.end_headers()
        self.wfile.write(reply.removeprefix("RAW").encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.script, Server.seen = [], []
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}/v1"
    found.shutdown()
    found.server_close()


def endpoint(url, **more):
    return providers.Endpoint(url, "some-model", "TEST_KEY", timeout=5, retries=2, wait=0.01, **more)


def test_endpoint_speaks_the_api(server, monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret-123")
    Server.script = [(429, "slow"), (200, "RAW{broken"), (200, "- owl\n- bat")]
    assert endpoint(server).complete([{"role": "user", "content": "hello"}]) == "- owl\n- bat"
    path, key, body = Server.seen[-1]
    assert path == "/v1/chat/completions" and key == "Bearer secret-123"
    assert body == {"model": "some-model", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ([(500, "")] * 3, "HTTP 500 3 times"),
        ([(200, "RAW[]")] * 3, "malformed JSON"),
        ([(200, "  ")] * 3, "an empty answer"),
        ([(401, "")], "refused the key"),
        ([(404, "")], "refused the request"),
    ],
)
def test_endpoint_failures_are_one_line(server, monkeypatch, script, word):
    monkeypatch.setenv("TEST_KEY", "secret-123")
    Server.script = list(script)
    with pytest.raises(UserError, match=word) as caught:
        endpoint(server).complete([])
    assert "secret" not in str(caught.value)


def test_nobody_listens():
    with pytest.raises(UserError, match="no answer"):
        endpoint("http://127.0.0.1:9").complete([])
    with pytest.raises(UserError, match="no address"):
        endpoint("localhost")


def test_envision_command_keeps_answers_and_no_key(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123")
    ids, out = tmp_path / "ids.txt", tmp_path / "made.json"
    ids.write_text("owl\nbat\nmouse\n")
    argv = [
        "envision.py",
        "--id",
        str(ids),
        "--task",
        "near",
        "--n",
        "2",
        "--url",
        server,
        "--model",
        "m",
        "--out",
        str(out),
        "--retries",
        "0",
    ]
    monkeypatch.setattr("sys.argv", argv)
    Server.script = [(200, "- kite\n- glider"), (500, "")]
    with pytest.raises(UserError):
        envision.main()
    assert len(runs.read_json(out.with_suffix(".answers.json"))["answers"]) == 1 and not out.exists()
    asked = len(Server.seen)
    Server.script = [(200, "- leaf"), (200, "- stone\nbye")]
    envision.main()
    assert len(Server.seen) == asked + 2  # the kept answer is not asked for again
    made = runs.read_json(out)
    assert made["names"] == {"owl": ["kite", "glider"], "bat": ["leaf"], "mouse": ["stone"]}
    for path in tmp_path.iterdir():
        assert "secret-123" not in path.read_text()
    assert "secret-123" not in capsys.readouterr().out


@pytest.mark.realdata
def test_published_lists_clean_to_the_known_counts():
    root = Path(os.environ.get("REPRO_DATA", "nowhere")) / "eoe"
    if not (root / "label_counts.csv").is_file():
        pytest.skip("no $REPRO_DATA/eoe/label_counts.csv")
    import csv

    names = {
        "ImageNet": "imagenet1k",
        "bird200": "cub200",
        "car196": "cars196",
        "ImageNet10": "imagenet10",
        "ImageNet20": "imagenet20",
    }
    names |= {"cub100_ID": "cub100", "car98_ID": "cars98", "food50_ID": "food50", "pet18_ID": "pet18"}
    rows = list(csv.DictReader(open(root / "label_counts.csv")))
    for row in rows:
        path = root / "envisioned_classes" / row["folder"] / f"{row['id_dataset']}_{row['llm']}_{row['run']}.json"
        found = [n for g in reading.read_names(path).groups.values() for n in g]
        ids = data.id_names(names.get(row["id_dataset"], row["id_dataset"]))
        plain = row["after_near_word_overlap"] or row["after_id_string_match"]
        variant = (
            "irrelevant"
            if "irrelevant" in row["folder"]
            else "dissimilar"
            if "dissimilar" in row["folder"]
            else "resemble"
        )
        task = "near" if row["folder"].startswith("near") else "far"
        assert len(found) == int(row["raw"]) and len({n.lower() for n in found}) == int(row["unique_lowercase"])
        assert len(clean(found, ids, "far").names) == int(row["after_id_string_match"]), row
        if variant == "resemble":
            assert len(clean(found, ids, task).names) == int(plain), row
    assert len(rows) > 100
