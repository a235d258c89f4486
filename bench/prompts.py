"""Natural text for the benchmarks: worked examples, and openings that branches begin with."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from minirksc.text.tokenizer import Tokenizer

OPENINGS = (
    " Let us first write down every number that the question gives, and then see which of them we really need here.",
    " We go through the story from its beginning to its end and keep track of the amount after each of the steps.",
    " It helps to work backwards: what would have to be known just before the last step so that the rest follows?",
    " First a rough estimate, so that we notice a slip of the pen later; after that the exact calculation in order.",
    " We name the unknown quantity x, turn each sentence of the question into an equation, and solve these for x.",
    " A small table makes this clear: one line for each thing that happens, one column for what is left afterwards.",
    " The question has two parts that do not depend on each other, so we solve them one by one and add the results.",
    " Before any calculation we check the units, since minutes, hours, prices and counts must not be mixed up here.",
)
"""Each of at least 20 tokens, which is what a hint is by default."""


def read_examples(file: Path) -> list[tuple[str, str]]:
    """(question, answer) of each line of a JSONL file with these fields."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(row["question"], row["answer"]) for row in rows]


EXAMPLES = read_examples(Path(__file__).with_name("examples.jsonl"))
"""Word problems with worked answers: question and answer of each."""


def few_shot_ids(tokenizer: Tokenizer, examples: Sequence[tuple[str, str]], num_tokens: int) -> list[int]:
    """Exactly `num_tokens` token ids: worked examples, over and over, then a question left open."""
    question = f"Question: {examples[0][0]}\nAnswer:"
    text = question
    for asked, answered in itertools.cycle([*examples[1:], examples[0]]):
        ids = tokenizer.encode(text)
        if len(ids) >= num_tokens:
            break
        text = f"Question: {asked}\nAnswer: {answered}\n\n{text}"
    # What is too much goes from the front, but BOS, where there is one, stays first.
    head = [i for i in ids[:1] if i == tokenizer.bos_token_id]
    return head + ids[len(ids) - num_tokens + len(head) :]


def opening_ids(tokenizer: Tokenizer, count: int, num_tokens: int) -> list[list[int]]:
    """`count` openings of exactly `num_tokens` token ids each."""
    openings = []
    for number, text in enumerate(itertools.islice(itertools.cycle(OPENINGS), count)):
        # From the ninth on, a number keeps them different.
        start = f" ({number + 1})" if number >= len(OPENINGS) else ""
        ids = tokenizer.encode(start + text, add_special_tokens=False)
        openings.append(list(itertools.islice(itertools.cycle(ids), num_tokens)))
    return openings
