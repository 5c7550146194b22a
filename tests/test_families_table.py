"""docs/models.md says what the families and the rules of trainers and engines say."""

from __future__ import annotations

import re

from runner.models import FAMILIES
from tests import families_table as page


def test_the_table_is_what_the_rules_say() -> None:
    text = page.PAGE.read_text()
    shown = text.split(page.BEGIN)[1].split(page.END)[0].strip()
    assert shown == page.table(), "python -m tests.families_table writes it anew"


def test_every_family_but_the_one_that_sees_has_a_twin() -> None:
    assert page.published().keys() == FAMILIES.keys() - {page.VISION}


def test_every_test_that_it_names_is_there() -> None:
    named = set(re.findall(r"`(tests/[\w/]+(?:\.py)?)/?`", page.PAGE.read_text()))
    root = page.PAGE.parents[1]
    assert len(named) >= 7 and not [name for name in named if not (root / name).exists()]
