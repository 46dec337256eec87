import collections
import random

import numpy as np
import pytest

from flax_pref.data.pairs import Drop, Judgement, Tie
from flax_pref.data.selection import Choice, select


class Rows:
    """A reader of judgements without images."""

    winner_listed_first = False

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def judgements(self, rows):
        return (self.rows[row] for row in rows)


def judged(caption="a", winner="w", loser="l", **known):
    return Judgement(caption, 0, (winner, loser), **known)


def test_ties_and_damaged_rows_are_counted_and_captions_numbered_by_first_appearance():
    rows = [judged("b"), Tie(), judged("a"), Drop("caption is empty"), judged("b"), Judgement("c", 1, ("x", "y"))]
    chosen = select(Rows(rows), Choice())
    assert chosen.rows.tolist() == [0, 2, 4, 5]
    assert chosen.captions == ("b", "a", "c") and chosen.caption_of.tolist() == [0, 1, 0, 2]
    assert chosen.ties == 1 and chosen.drops == {3: Drop("caption is empty")} and chosen.total == 6


def test_captions_of_rows_that_are_left_out_are_not_encoded():
    rows = [judged("a", "x", "y"), judged("b", "y", "x"), judged("c", "u", "v")]
    chosen = select(Rows(rows), Choice(unique_roles=True))
    assert chosen.captions == ("c",) and chosen.caption_of.tolist() == [0]


def test_filters_leave_out_on_purpose_and_say_why():
    rows = [
        judged(confidence=0.9, models=("sd", "xl")),
        judged(confidence=0.4, models=("sd", "xl")),
        judged(models=("sd", "xl")),
        judged(confidence=0.9, models=("sd", "other")),
        judged(confidence=0.9),
    ]
    chosen = select(Rows(rows), Choice(min_confidence=0.8, models=("sd", "xl")))
    assert chosen.rows.tolist() == [0]
    assert [drop.reason for drop in chosen.drops.values()] == [
        "confidence is too low",
        "confidence is unknown",
        "image of another model",
        "models are unknown",
    ]
    assert not any(drop.damaged for drop in chosen.drops.values())
    assert chosen.drops[3].detail == "other"


@pytest.mark.parametrize(("limit", "used", "read"), [(1, [1], 2), (2, [1, 3], 4), (3, [1, 3, 4], 5), (9, [1, 3, 4], 5)])
def test_a_limit_keeps_the_first_pairs_and_reads_no_further(limit, used, read):
    rows, seen = [Tie(), judged("b"), Drop("caption is empty"), judged("a"), judged("c")], []

    class Watched(Rows):
        def judgements(self, rows):
            for row in rows:
                seen.append(row)
                yield self.rows[row]

    chosen = select(Watched(rows), Choice(limit=limit))
    assert chosen.rows.tolist() == used and chosen.total == read
    assert len(seen) <= read + 1
    assert len(chosen.rows) + chosen.ties + len(chosen.drops) == chosen.total
    with pytest.raises(ValueError, match="limit is 0; expected at least 1"):
        Choice(limit=0)


def transcribed_roles(rows):
    """The rule as it is told, image by image."""
    wins, losses = collections.Counter(), collections.Counter()
    for row in rows:
        wins[row.ids[row.winner]] += 1
        losses[row.ids[1 - row.winner]] += 1
    winners = {image for image in wins if wins[image] > losses[image]}
    losers = {image for image in losses if losses[image] > wins[image]}
    return [i for i, row in enumerate(rows) if row.ids[row.winner] in winners and row.ids[1 - row.winner] in losers]


@pytest.mark.parametrize("seed", range(20))
def test_with_unique_roles_no_image_wins_here_and_loses_there(seed):
    rng = random.Random(seed)
    images = [f"image {i}" for i in range(rng.choice((5, 30, 200)))]
    rows = [Judgement("a", rng.randrange(2), tuple(rng.sample(images, 2))) for _ in range(150)]
    plain, chosen = select(Rows(rows), Choice()), select(Rows(rows), Choice(unique_roles=True))
    assert chosen.rows.tolist() == transcribed_roles(rows)
    used = [rows[row] for row in chosen.rows]
    assert not {row.ids[row.winner] for row in used} & {row.ids[1 - row.winner] for row in used}
    assert chosen.cost_of_unique_roles == len(plain.rows) - len(chosen.rows) == len(chosen.drops)
    assert plain.cost_of_unique_roles == 0


def test_no_rows_at_all_are_no_error():
    for choice in (Choice(), Choice(unique_roles=True)):
        chosen = select(Rows([Tie(), Drop("x")]), choice)
        assert not len(chosen.rows) and chosen.captions == () and chosen.rows.dtype == np.int64
