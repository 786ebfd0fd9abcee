"""The text the demo's model is pretrained on: tiny stories and word games, from a grammar of ours.

Every line is a document of at most 32 tokens. Half of them are stories, in which people, things and
places come back as in real ones; half are games with lists of words (copy, first, last, after,
before, repeat, count). Reversing a list is no game of this corpus: the demo's adapters teach it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

GIRLS = "anna clara ella ida lena mira nora olga rosa sara tilda vera".split()
BOYS = "adam boris carl emil felix hugo ivan leo max oskar paul tom".split()
ANIMALS = "bear cat cow dog duck fox frog goat hen horse mouse owl pig rabbit sheep wolf".split()
THINGS = (
    "apple ball bell book boat box bread cake chair coin cup drum flower hat key kite lamp map "
    "nut pear pen plate ring rope shell shoe spoon stone sword toy watch wheel"
).split()
PLACES = "barn beach bridge castle field forest garden hill house lake market mill".split()
COLOURS = "black blue brown green grey pink red white yellow".split()
QUALITIES = "big clean little long new old round small soft warm".split()
MOODS = "angry happy hungry kind proud sad sleepy tired".split()
MOVES = "drove hurried jumped ran swam walked went".split()
FINDS = "bought found got saw took wanted".split()
GIVES = "brought gave lent showed".split()
FEELS = "cried danced laughed sang smiled waited".split()
TIMES = "today yesterday then later".split()
NUMBERS = "one two three four five six seven eight".split()
SYLLABLES = [a + b + c for a in "bdfklmt" for b in "aiou" for c in "nrs"]

LISTED = (*ANIMALS, *THINGS, *PLACES, *SYLLABLES)
"""The words that the games, and the demo's task, are played with."""

_OTHERS = (
    "a an and at because but copy first last after before repeat count for found gone had he her "
    "his in into lost on reverse said she so the there to too very was where with -> : . , ?"
).split()


def vocabulary() -> list[str]:
    """Every word of the corpus, and of the demo's task, once."""
    lists = (
        _OTHERS, NUMBERS, GIRLS, BOYS, COLOURS, QUALITIES, MOODS, MOVES, FINDS, GIVES, FEELS, TIMES,
        LISTED,
    )  # fmt: skip
    return list(dict.fromkeys(word for words in lists for word in words))


def lines(seed: int) -> Iterator[str]:
    """Lines without end; the same seed gives the same lines."""
    source = random.Random(seed)
    while True:
        yield (_story if source.random() < 0.5 else _game)(source)


def _story(source: random.Random) -> str:
    return source.choice(_STORIES)(source)


def _game(source: random.Random) -> str:
    return source.choice(list(GAMES.values()))(source)


def _person(source: random.Random) -> tuple[str, str, str]:
    """A name, its pronoun and its possessive."""
    if source.random() < 0.5:
        return source.choice(GIRLS), "she", "her"
    return source.choice(BOYS), "he", "his"


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _described(source: random.Random, noun: str) -> str:
    """The noun, perhaps with a quality and a colour, in the order English wants them."""
    quality = source.choice(QUALITIES) + " " if source.random() < 0.4 else ""
    colour = source.choice(COLOURS) + " " if source.random() < 0.4 else ""
    return quality + colour + noun


def _found_and_given(source: random.Random) -> str:
    name, pronoun, _ = _person(source)
    other = _person(source)[0]
    thing, place = source.choice(THINGS), source.choice(PLACES)
    return (
        f"{name} {source.choice(FINDS)} {_with_article(_described(source, thing))} "
        f"at the {place} . {pronoun} {source.choice(GIVES)} the {thing} to {other} . "
        f"{other} {source.choice(FEELS)} ."
    )


def _walk_with_animal(source: random.Random) -> str:
    name, pronoun, possessive = _person(source)
    animal, place = source.choice(ANIMALS), source.choice(PLACES)
    backwards = " in reverse" if source.random() < 0.1 else ""
    return (
        f"{name} had {_with_article(_described(source, animal))} . {source.choice(TIMES)} "
        f"{pronoun} {source.choice(MOVES)}{backwards} to the {place} with {possessive} {animal} . "
        f"the {animal} was very {source.choice(MOODS)} ."
    )


def _lost(source: random.Random) -> str:
    name, pronoun, possessive = _person(source)
    thing, place = source.choice(THINGS), source.choice(PLACES)
    mood = source.choice(MOODS)
    return (
        f"{name} was {mood} because {possessive} {_described(source, thing)} was gone . {pronoun} "
        f"{source.choice(MOVES)} to the {place} and found the {thing} there ."
    )


def _two_people(source: random.Random) -> str:
    first, pronoun, _ = _person(source)
    second, other_pronoun, _ = _person(source)
    while second == first:
        second, other_pronoun, _ = _person(source)
    move, mood, other_mood = source.choice(MOVES), *source.sample(MOODS, 2)
    return (
        f"{first} and {second} {move} into the {source.choice(PLACES)} . {first} was {mood} but "
        f"{second} was {other_mood} . so {pronoun} {source.choice(FEELS)} and {other_pronoun} "
        f"{source.choice(FEELS)} too ."
    )


def _question(source: random.Random) -> str:
    name, pronoun, _ = _person(source)
    thing, place = source.choice(THINGS), source.choice(PLACES)
    preposition = source.choice(("in", "at", "on"))
    return (
        f"{name} lost the {_described(source, thing)} {preposition} the {place} . where was the "
        f"{thing} ? {preposition} the {place} , said {pronoun} ."
    )


def _words(source: random.Random, low: int, high: int) -> list[str]:
    return source.sample(LISTED, source.randint(low, high))


def _copy(source: random.Random) -> str:
    words = " ".join(_words(source, 1, 8))
    return f"copy : {words} -> {words}"


def _first(source: random.Random) -> str:
    words = _words(source, 2, 8)
    return f"first : {' '.join(words)} -> {words[0]}"


def _last(source: random.Random) -> str:
    words = _words(source, 2, 8)
    return f"last : {' '.join(words)} -> {words[-1]}"


def _after(source: random.Random) -> str:
    words = _words(source, 2, 8)
    place = source.randrange(len(words) - 1)
    return f"after {words[place]} : {' '.join(words)} -> {words[place + 1]}"


def _before(source: random.Random) -> str:
    words = _words(source, 2, 8)
    place = source.randrange(1, len(words))
    return f"before {words[place]} : {' '.join(words)} -> {words[place - 1]}"


def _repeat(source: random.Random) -> str:
    word, times = source.choice(LISTED), source.randint(1, 6)
    return f"repeat {NUMBERS[times - 1]} : {word} -> {' '.join([word] * times)}"


def _count(source: random.Random) -> str:
    words = _words(source, 1, 8)
    return f"count : {' '.join(words)} -> {NUMBERS[len(words) - 1]}"


_Maker = Callable[[random.Random], str]
_STORIES: tuple[_Maker, ...] = (
    _found_and_given, _walk_with_animal, _lost, _two_people, _question,
)  # fmt: skip
GAMES: dict[str, _Maker] = {
    "copy": _copy,
    "first": _first,
    "last": _last,
    "after": _after,
    "before": _before,
    "repeat": _repeat,
    "count": _count,
}
"""The games by name; each makes one line, a question and its answer after the arrow."""
