"""Natural text for the benchmarks: worked examples, and openings that branches begin with."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from minirksc.text.tokenizer import Tokenizer

EXAMPLES = (
    (
        "A bakery bakes 18 trays of rolls with 24 rolls on each tray. By noon it has sold 257 rolls, "
        "and 31 more go to a school in the afternoon. How many rolls are left in the evening?",
        "The bakery bakes 18 * 24 = 432 rolls. It sells 257 rolls by noon, so 432 - 257 = 175 remain. "
        "After the school has taken 31, there are 175 - 31 = 144 rolls left. The answer is 144.",
    ),
    (
        "Mira cycles to work on four days of the week. One way is 7 kilometres. On Saturday she rides "
        "26 kilometres for fun. How many kilometres does she cycle in a week?",
        "One working day is there and back, 2 * 7 = 14 kilometres. Four such days are 4 * 14 = 56 "
        "kilometres. With the ride on Saturday that is 56 + 26 = 82 kilometres. The answer is 82.",
    ),
    (
        "A tank holds 900 litres. A pump fills it with 45 litres a minute while a leak loses 15 litres "
        "a minute. How many minutes does it take until the empty tank is full?",
        "Each minute the tank gains 45 - 15 = 30 litres. To hold 900 litres it needs 900 / 30 = 30 "
        "minutes. The answer is 30.",
    ),
    (
        "Three friends share the cost of a tent. It costs 210 euros, but a voucher takes off one "
        "tenth. The oldest pays 20 euros more than each of the others. How much does the oldest pay?",
        "The voucher takes off 210 / 10 = 21 euros, so the tent costs 189 euros. Without the extra 20 "
        "euros the three shares would be equal: 189 - 20 = 169, and 169 / 3 is about 56.33 euros. The "
        "oldest pays 56.33 + 20 = 76.33 euros. The answer is 76.33.",
    ),
    (
        "A library lends 340 books on Monday. On Tuesday it lends a quarter fewer, and on Wednesday 60 "
        "more than on Tuesday. How many books does it lend on the three days together?",
        "A quarter of 340 is 85, so on Tuesday it lends 340 - 85 = 255 books. On Wednesday it lends "
        "255 + 60 = 315 books. Together that is 340 + 255 + 315 = 910 books. The answer is 910.",
    ),
    (
        "A farmer plants 12 rows of apple trees with 15 trees in each row. One tree in nine does not "
        "survive the winter. Each tree that survives bears 40 kilograms of apples. How many kilograms "
        "does he harvest?",
        "He plants 12 * 15 = 180 trees. One in nine is 180 / 9 = 20 trees, so 160 survive. They bear "
        "160 * 40 = 6400 kilograms. The answer is 6400.",
    ),
    (
        "Jonas reads 35 pages on each weekday and 60 pages on each day of the weekend. His book has "
        "590 pages. How many pages are left after two full weeks?",
        "A week has five weekdays, 5 * 35 = 175 pages, and two days of weekend, 2 * 60 = 120 pages, "
        "together 295 pages. In two weeks he reads 2 * 295 = 590 pages. The whole book is read. The "
        "answer is 0.",
    ),
    (
        "A train leaves at 9:20 and travels 150 kilometres at 100 kilometres an hour. It waits for 12 "
        "minutes and then needs 43 minutes for the rest. At what time does it arrive?",
        "The first part takes 150 / 100 = 1.5 hours, which is 90 minutes. All together it takes 90 + "
        "12 + 43 = 145 minutes, or 2 hours and 25 minutes. 9:20 and 2:25 make 11:45. The answer is "
        "11:45.",
    ),
)
"""Question and answer."""

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
