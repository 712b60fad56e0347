"""Conversations with whoever answers: a language model, or a rule in its place."""

import datetime
import math

from lab.progress import progress

from names.prompts import PER_CALL, Question, Task, Variant, follow_up, opening, prefix, prompt
from names.reading import read_answers


def ask(provider, q: Question, answers: list[str]) -> tuple[str, list[str]]:
    """(next answer of a conversation whose earlier answers are given, refused ones before it).

    An answer without a name is asked for once more: with the prefix that the paper puts before the prompts of models
    that keep to no format, and, where the provider can go on from an opened answer, with the list opened for it.
    """
    messages = [{"role": "user", "content": prompt(q)}]
    for earlier in answers:
        messages += [{"role": "assistant", "content": earlier}, {"role": "user", "content": follow_up(q)}]
    first = provider.complete(messages, q)
    if read_answers([first]).names:
        return first, []
    again = [{**messages[0], "content": f"{prefix(q)}\n\n{prompt(q)}"}, *messages[1:]]
    if getattr(provider, "continues", False):
        begun = opening(q)
        return begun + provider.complete([*again, {"role": "assistant", "content": begun}], q), [first]
    return provider.complete(again, q), [first]


def conversation(provider, q: Question, total: int, kept: list[dict] | None = None, save=None) -> list[dict]:
    """Turns until `total` names were asked for, or a turn brings none; `kept`: turns of an earlier start, of which one
    without a name at the end is asked again; `save(turns)` after each."""
    turns = list(kept or [])
    while turns and not read_answers([turns[-1]["answer"]]).names:
        turns.pop()
    count = 1 if q.task == "near" else max(1, math.ceil(total / q.n))
    while len(turns) < count:
        text, refused = ask(provider, q, [t["answer"] for t in turns])
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        asked = prompt(q) if not turns else follow_up(q)
        turn = {"model": provider.name, "time": when, "prompt": asked, "answer": text}
        turns.append(turn | ({"refused": refused} if refused else {}))
        if save:
            save(turns)
        if not read_answers([text]).names:
            break  # at temperature 0 the next turn would be no better
    return turns


def envision(
    provider,
    id_names: list[str],
    task: Task,
    n: int,
    variant: Variant = "resemble",
    kind: str = "object",
    save=None,
    kept: dict | None = None,
) -> dict[str, list[dict]]:
    """All conversations of a task: near has one for each ID name with n names each, the others one with n in all."""
    done = dict(kept or {})
    wanted = {name: (name,) for name in dict.fromkeys(id_names)} if task == "near" else {"all": tuple(id_names)}
    for key, names in progress(wanted.items(), "asking", len(wanted), hide=len(wanted) == 1):
        q = Question(task, variant, names, n if task == "near" else min(n, PER_CALL), kind)

        def keep(turns: list[dict], key: str = key) -> None:
            done[key] = turns
            if save:
                save(done)

        done[key] = conversation(provider, q, n, done.get(key), keep)
    return done
