"""A local chat model, built tiny and random on the spot; a chain of questions that is killed and started again."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

from lab import runs
from lab.runs import UserError

import pytest
import torch

import envision
from names import providers


def words_tokenizer(kind: str = "word"):
    """A fast tokenizer over a handful of words, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", "[END]", "-", "a", "photo", "of", "cat", "dog", "owl", "bat", "user", ":", "\n"]
    found = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=found, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]", model_max_length=4096
    )


@pytest.fixture
def chat(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer = words_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=4096, n_embd=8, n_layer=1, n_head=2,
                        bos_token_id=2, eos_token_id=2, pad_token_id=1)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat", tokenizer


def test_local_model_answers_greedily(chat):
    folder, tokenizer = chat
    messages = [{"role": "user", "content": "a photo of a cat"}]
    plain = providers.LocalModel(str(folder), max_new_tokens=5)
    one = plain.complete(messages)
    assert one == plain.complete(messages) and plain.name == "chat"
    # What generate() does, step by step: the most probable next word, appended.
    ids = tokenizer("a photo of a cat", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(5):
        nearest = plain.model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, nearest.view(1, 1)], 1)
        if nearest == tokenizer.eos_token_id:
            break
    assert one == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    templated = providers.LocalModel(str(folder), max_new_tokens=5)
    seen = {}
    generate = templated.model.generate
    templated.model.generate = lambda **k: seen.update(k) or generate(**k)
    templated.complete(messages)
    assert tokenizer.decode(seen["input_ids"][0]).startswith("user : a photo of a cat")


def test_envision_command_with_a_local_model(chat, tmp_path, monkeypatch):
    folder, _ = chat
    ids, out = tmp_path / "ids.txt", tmp_path / "made.json"
    ids.write_text("cat\ndog\n")
    monkeypatch.setattr(providers.LocalModel.__init__, "__defaults__", (4,))
    argv = [
        "envision.py",
        "--id",
        ids,
        "--task",
        "near",
        "--n",
        "1",
        "--provider",
        "local",
        "--model",
        folder,
        "--out",
        out,
    ]
    monkeypatch.setattr("sys.argv", [str(a) for a in argv])
    with pytest.raises(UserError, match=r"gave no name for cat, dog \(2 of 2 conversations\), asked twice"):
        envision.main()  # its weights are random
    kept = runs.read_json(out.with_suffix(".answers.json"))["answers"]
    assert {*kept} == {"cat", "dog"} and all(t[0]["model"] == "chat" and t[0]["prompt"] for t in kept.values())
    assert not out.exists()
    asked = []

    def answer(self, messages, question=None):
        asked.append(messages)
        return " kite\n- leaf" if messages[-1]["role"] == "assistant" else "Sure!"

    monkeypatch.setattr(providers.LocalModel, "complete", answer)
    envision.main()
    assert runs.read_json(out)["names"] == {"cat": ["kite", "leaf"], "dog": ["kite", "leaf"]}
    assert [len(m) for m in asked] == [1, 2, 1, 2]


def test_an_opened_answer_is_gone_on_with(chat):
    """The tokens that the model gets end with the opened list, with no end of turn behind it."""
    folder, tokenizer = chat
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% if not loop.last or m['role'] == 'user' %}"
        "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    model = providers.LocalModel(str(folder), max_new_tokens=2)
    seen = {}
    generate = model.model.generate
    model.model.generate = lambda **k: seen.update(k) or generate(**k)
    model.complete([{"role": "user", "content": "cat"}, {"role": "assistant", "content": "a photo of"}])
    assert tokenizer.decode(seen["input_ids"][0]).rstrip().endswith("a photo of")


@pytest.mark.parametrize(
    "broken", ["config.json", "model.safetensors", "tokenizer.json"], ids=lambda x: x.split(".")[0]
)
def test_a_damaged_local_model_is_one_line(broken, chat):
    folder, _ = chat
    (folder / broken).write_bytes(b"{half")
    with pytest.raises(UserError, match="transformers cannot load"):
        providers.LocalModel(str(folder))


def test_what_a_loader_raises_is_one_line(tmp_path, monkeypatch):
    """A GGUF file without the package that reads it is an ImportError; a damaged one anything."""
    import transformers

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="transformers cannot load"):
        providers.LocalModel(str(tmp_path))
    for error in (ImportError("please install gguf"), KeyError("x"), NotImplementedError("unknown architecture")):

        def fail(*a, error=error, **k):
            raise error

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(UserError, match=f"transformers cannot load .*{type(error).__name__}"):
            providers.LocalModel(str(tmp_path))


@pytest.mark.slow
def test_smollm2_of_the_package_answers():
    model = providers.LocalModel("smollm2", max_new_tokens=8)
    assert model.name == "smollm2"
    assert "Paris" in model.complete([{"role": "user", "content": "What is the capital of France?"}])


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers turn k with `- name k`; from turn `stuck` on it never answers until it is let go."""

    asked: list = []
    stuck = 3
    free = threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn = (len(body["messages"]) + 1) // 2
        if turn >= self.stuck:
            self.free.wait(60)
        type(self).asked.append((turn, [m["content"] for m in body["messages"] if m["role"] == "assistant"]))
        try:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": f"- name {turn}"}}]}).encode())
        except OSError:
            pass  # the asker was killed

    def log_message(self, *args):
        pass


def test_killed_in_the_middle_of_a_chain_nothing_is_lost_or_asked_twice(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ids, out = tmp_path / "ids.txt", tmp_path / "made.json"
    ids.write_text("owl\nbat\n")
    raw = out.with_suffix(".answers.json")
    argv = [sys.executable, "envision.py", "--id", ids, "--task", "far", "--n", "250", "--model", "m", "--out", out,
            "--url", f"http://127.0.0.1:{server.server_port}/v1"]  # fmt: skip
    command = [str(a) for a in argv]
    try:
        process = subprocess.Popen(command, cwd=runs.HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if raw.is_file() and len(runs.read_json(raw)["answers"].get("all", [])) == 2:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)  # it waits for the third answer
        process.communicate()
        assert not out.exists()
        before = runs.read_json(raw)["answers"]["all"]
        assert [t["answer"] for t in before] == ["- name 1", "- name 2"]
        Slow.free.set()
        done = subprocess.run(command, cwd=runs.HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        Slow.free.set()
        server.shutdown()
        server.server_close()
    after = runs.read_json(raw)["answers"]["all"]
    assert after[:2] == before and len(after) == 5
    assert runs.read_json(out)["names"] == [f"name {i}" for i in range(1, 6)]
    turns = [t for t, _ in Slow.asked]
    assert turns.count(1) == turns.count(2) == 1  # kept answers are not asked for again
    assert [a for t, a in Slow.asked if t == 5] == [[f"- name {i}" for i in range(1, 5)]]
