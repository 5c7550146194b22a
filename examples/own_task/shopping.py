"""Word problems of your own: `python shopping.py` writes train.jsonl and test.jsonl, and `close` is a part of their reward.

conf/task/shopping.yaml is the option `task=shopping`: prompt, files and the parts of the reward.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from runner.data import Sample
from runner.tasks.protocol import Prompt

THINGS = ("apples", "pens", "tickets", "books", "eggs")


def problem(dice: random.Random) -> dict[str, str]:
    """A line of the file: the question, and a worked answer that ends in `#### number`."""
    count, price, thing = dice.randint(2, 9), dice.randint(2, 9), dice.choice(THINGS)
    question = f"{count} {thing} at {price} each. How much?"
    return {"question": question, "answer": f"{count} * {price} = {count * price}\n#### {count * price}"}


async def close(prompt: Prompt, text: str, sample: Sample) -> float:
    """1 for the right number, less the further away it is, 0 where none can be read: easier to learn from than right or wrong."""
    said = text.rpartition("####")[2].strip()
    if not said.isascii() or not said.isdigit():
        return 0.0
    return max(0.0, 1.0 - abs(int(said) - int(prompt.answer)) / 10)


def main() -> None:
    for name, count, seed in (("train", 512, 1), ("test", 64, 2)):
        dice = random.Random(seed)
        lines = [json.dumps(problem(dice)) for _ in range(count)]
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
