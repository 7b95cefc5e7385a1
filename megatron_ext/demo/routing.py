"""The support desk of ``demo://routing``: messages, the department that takes over, and the benchmark on unseen ones.

A message complains about one thing and, mostly, praises another one that belongs to a different department, in either
order; complaints and praise share their words ("has let me down", "has never let me down"). So neither a keyword nor
a position gives the answer away: the model has to find what the complaint is about. One fifth of all pairs of (thing,
complaint) appear in held-out messages only; each thing and each complaint for itself is seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

THINGS = {
    "Billing": (
        "invoice", "refund", "credit note", "direct debit", "discount", "receipt", "monthly fee", "final bill",
        "voucher", "deposit",
    ),
    "Delivery": (
        "parcel", "tracking number", "shipment", "courier", "pickup point", "package", "delivery slot", "crate",
        "customs form", "doorstep drop",
    ),
    "Account": (
        "password", "login", "profile", "username", "email address", "security code", "sign-in link", "membership",
        "recovery question", "newsletter",
    ),
    "Technical": (
        "screen", "battery", "keyboard", "camera", "charger", "speaker", "printer", "router", "touchpad", "software",
    ),
}  # fmt: skip
COMPLAINTS = (
    "is wrong", "is not in order", "has let me down again", "was not what you promised", "needs attention", "is a mess",
    "has been a lot of trouble", "makes no sense to me", "is still not right", "gave me a bad surprise",
    "did not go well", "has made me unhappy", "is worse than before", "cannot stay like this", "is not fine at all",
)  # fmt: skip
PRAISE = (
    "is perfect", "is all in order", "has never let me down", "was just what you promised", "needs no attention",
    "is not a mess any more", "has been no trouble at all", "makes sense to me", "is right", "gave me a good surprise",
    "did go well", "has made me happy", "is better than before", "can stay like this", "is fine",
)  # fmt: skip
OPENINGS = ("", "", "", "Hello. ", "Good morning. ", "Hello from {city}. ", "My name is {name}. ")
CLOSINGS = ("", "", "", " Please help.", " What now?", " Thank you.", " Best wishes, {name}.")
NAMES = ("Anna", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ivan", "Joana", "Kofi", "Lena")
CITIES = ("Porto", "Oslo", "Graz", "Lima", "Kyoto", "Accra", "Turin", "Leeds", "Quito", "Pune")
ALONE = ("My {thing} {complaint}.", "I write because my {thing} {complaint}.")
CONTRASTED = (
    "My {other} {praise}, but my {thing} {complaint}.",
    "My {thing} {complaint}, but my {other} {praise}.",
    "My {other} {praise}. My {thing} {complaint}.",
    "My {thing} {complaint}. My {other} {praise}.",
    "I see that my {other} {praise} and that my {thing} {complaint}.",
    "I see that my {thing} {complaint} and that my {other} {praise}.",
)
SHARE_ALONE = 0.2
TRAIN_ROWS = 12_000
PAIRS = 6_000
"""Of the training rows, those that are preferences, too: the reference model reads every one of them, twice."""
HELDOUT_ROWS = 320

TASK_FILE = "demo_routing.yaml"
TASK = f"""# Which department takes over? Held-out split of demo://routing; chance is 1 in {len(THINGS)}.
# data_files is relative to this folder: `mflow evaluate --include-path` runs here.
task: demo_routing
dataset_path: json
dataset_kwargs:
  data_files:
    test: heldout.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{message}}}}"
doc_to_choice: [{", ".join(THINGS)}]
doc_to_target: label
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

Pair = tuple[str, str, str]
"""Department, thing, complaint."""


def rows(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows: ``message``, ``department``, ``thing``, ``complaint``, ``label`` (its index)."""
    rng = random.Random(f"demo://routing {seed}")
    seen, unseen = split_pairs(rng)
    messages: set[str] = set()
    heldout = [_row(pair, rng, messages) for pair in _balanced(unseen, HELDOUT_ROWS, rng)]
    train = [_row(pair, rng, messages) for pair in _balanced(seen, TRAIN_ROWS, rng)]
    return train, heldout


def split_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """All pairs of thing and complaint, the held-out fifth apart; every thing and complaint is in the first part."""
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for department, things in THINGS.items():
        complaints = rng.sample(COMPLAINTS, len(COMPLAINTS))
        for i, thing in enumerate(rng.sample(things, len(things))):
            for j, complaint in enumerate(complaints):
                parts[(i + j) % 5 == 0].append((department, thing, complaint))
    return parts


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` as the model is trained on it: an OpenAI ``messages`` row."""
    return {
        "messages": [
            {"role": "user", "content": row["message"]},
            {"role": "assistant", "content": row["department"]},
        ]
    }


def document(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` as plain text for pretraining: the message, and the department that took over."""
    return {"text": f"{row['message']} {row['department']}"}


def preference(row: dict[str, Any], number: int) -> dict[str, Any]:
    """``row`` as a pair: the right department is preferred to a wrong one, the three of which take turns."""
    wrong = [name for name in THINGS if name != row["department"]]
    turns = conversation(row)["messages"]
    return {
        "messages": turns[:1],
        "chosen": turns[1],
        "rejected": {"role": "assistant", "content": wrong[number % len(wrong)]},
    }


def corpus(train: list[dict[str, Any]]) -> Iterator[str]:
    """What the tokenizer is trained on: the training conversations, roles included; nothing held out."""
    for row in train:
        for turn in conversation(row)["messages"]:
            yield f"{turn['role']}\n{turn['content']}"


def _balanced(pairs: list[Pair], count: int, rng: random.Random) -> list[Pair]:
    """``count`` draws from ``pairs``, equally many of each department, shuffled."""
    by_department = [[pair for pair in pairs if pair[0] == department] for department in THINGS]
    drawn = [rng.choice(by_department[i % len(by_department)]) for i in range(count)]
    rng.shuffle(drawn)
    return drawn


def _row(pair: Pair, rng: random.Random, taken: set[str]) -> dict[str, Any]:
    """A message about ``pair`` that is not in ``taken`` yet."""
    department, thing, complaint = pair
    others = [other for name, things in THINGS.items() if name != department for other in things]
    while True:
        form = rng.choice(ALONE if rng.random() < SHARE_ALONE else CONTRASTED)
        text = f"{rng.choice(OPENINGS)}{form}{rng.choice(CLOSINGS)}".format(
            thing=thing, complaint=complaint, other=rng.choice(others), praise=rng.choice(PRAISE),
            name=rng.choice(NAMES), city=rng.choice(CITIES),
        )  # fmt: skip
        if text not in taken:
            taken.add(text)
            return {
                "message": text,
                "department": department,
                "thing": thing,
                "complaint": complaint,
                "label": list(THINGS).index(department),
            }
