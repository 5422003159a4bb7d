"""The restaurant world: records, forms to write them in, and tasks.

It follows E2E, the benchmark of the prefix-tuning paper.

The base learns to read a record in one form and to write it in others:

>>> record = Record("Palace", "Thai", "riverside", "cheap", 4)
>>> FORMS["table"](record)
'name : Palace | food : Thai | area : riverside | price : cheap | rating : 4'
>>> FORMS["sentence"](record)
'The Palace serves Thai food in the riverside area , asks cheap prices and is rated 4 of 5 .'

No document says which form it wants. That is what an adapter tells the frozen base. A task is a
pair of forms:

>>> TASKS["sentiment"]
Task(tier='elicited', source='review', target='verdict')
>>> task_example(TASKS["sentiment"], record).target
'positive'
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from data import Example


class Record(NamedTuple):
    """One restaurant."""

    name: str
    food: str
    area: str
    price: str
    rating: int


VALUES = Record(
    "Alder Amber Anchor Basil Beacon Cedar Clover Comet Coral Dragon Ember Falcon Ginger Hazel "
    "Indigo Jasmine Juniper Lantern Laurel Maple Meadow Nectar Olive Opal Orchid Palace Pepper "
    "Quince Raven Saffron Sorrel Thistle Tiger Umber Violet Willow".split(),
    "Thai Indian French Greek Turkish Polish Korean Spanish Mexican English Chinese "
    "Italian".split(),
    "riverside station harbour market castle museum park university".split(),
    "cheap fair moderate high low steep modest average".split(),
    [1, 2, 3, 4, 5],
)
TASTE = {1: "awful", 2: "poor", 3: "plain", 4: "good", 5: "superb"}
VERDICT = {1: "negative", 2: "negative", 3: "neutral", 4: "positive", 5: "positive"}


def successor(r: Record) -> Record:
    """-> the record of the next values in each list: a mapping that no document holds."""
    following = [values.index(value) + 1 for values, value in zip(VALUES, r)]
    return Record(*(values[i % len(values)] for values, i in zip(VALUES, following)))


# Values stand in mid-line behind a space, so each is the same token wherever it is copied.
FORMS: dict[str, Callable[[Record], str]] = {
    "table": lambda r: " | ".join(f"{key} : {value}" for key, value in r._asdict().items()),
    "sentence": lambda r: (
        f"The {r.name} serves {r.food} food in the {r.area} area , asks {r.price} prices and is "
        f"rated {r.rating} of 5 ."
    ),
    "chat": lambda r: (
        f"hey , try {r.name} by the {r.area} ! {r.food} , {r.price} , {r.rating} of 5"
    ),
    "advert": lambda r: (
        f"Tonight : {r.food} at the {r.name} ! rated {r.rating} of 5 , {r.price} , at the {r.area}"
    ),
    "review": lambda r: (
        f"I had {r.food} food at the {r.name} in the {r.area} area : {r.price} and "
        f"{TASTE[r.rating]} ."
    ),
    "verdict": lambda r: VERDICT[r.rating],
    "message": lambda r: f"Hello , does the {r.name} at the {r.area} still serve {r.food} food ?",
    "polite": lambda r: (
        f"Dear guest , the {r.name} is glad to serve you {r.food} food at the {r.area} ."
    ),
    "casual": lambda r: f"sure , come by the {r.area} , {r.name} has {r.food} ready !",
    "terse": lambda r: f"Yes : {r.name} , {r.area} , {r.food} .",
    "shifted": lambda r: FORMS["sentence"](successor(r)),
}

# What pretraining documents hold: a source, and the forms that may follow it.
DOCUMENTS = {
    "table": ["sentence", "chat", "advert"],
    "sentence": ["table", "chat", "advert"],
    "review": ["table", "sentence", "advert", "verdict"],
    "message": ["polite", "casual", "terse"],
}


class Task(NamedTuple):
    """elicited: documents hold the pair of forms. recombined: both forms, never as a pair. new:
    never the target."""

    tier: str
    source: str
    target: str


TASKS = {
    "sentence": Task("elicited", "table", "sentence"),
    "table": Task("elicited", "sentence", "table"),
    "sentiment": Task("elicited", "review", "verdict"),
    "reply": Task("elicited", "message", "polite"),
    "chat": Task("recombined", "review", "chat"),
    "verdict": Task("recombined", "table", "verdict"),
    "shifted": Task("new", "table", "shifted"),
}


def task_example(task: Task, record: Record) -> Example:
    return Example(FORMS[task.source](record), FORMS[task.target](record))


def split_of(record: Record) -> str:
    """-> "test" or "validation", one restaurant in eleven each, or "train".

    By name, food and area, which every source states: no test input ever equals a training input.
    Restaurants are numbered through. 11 divides none of the sizes in VALUES, so each value has its
    fair share in each split.
    """
    number = 0
    for values, value in zip(VALUES[:3], record):
        number = number * len(values) + values.index(value)
    return {0: "test", 1: "validation"}.get(number % 11, "train")


def random_record(rng: random.Random, split: str) -> Record:
    while True:
        record = Record(*(rng.choice(values) for values in VALUES))
        if split_of(record) == split:
            return record


def random_document(rng: random.Random) -> list[str]:
    """-> the lines of a document: a training record's source, and one or three of its forms.

    A value that comes several times is what teaches a model to copy.
    """
    record = random_record(rng, "train")
    source = rng.choice(list(DOCUMENTS))
    forms = rng.sample(DOCUMENTS[source], rng.choice([1, 3, 3, 3]))
    return [FORMS[form](record) for form in [source, *forms]]


def task_examples(name: str, split: str, n: int, seed: int) -> list[Example]:
    """-> n examples of a task on random records of one split."""
    rng = random.Random(f"{split} {seed}")
    return [task_example(TASKS[name], random_record(rng, split)) for _ in range(n)]
