"""Which pairs of a prepared set a consensus of rewards keeps."""

import collections
import shutil

import numpy as np
import pytest
from training.tiny import FIRST_ROW, tiny_set

from flax_pref.config import UserError
from flax_pref.data.consensus import Consensus, told_counts
from flax_pref.data.pair_scores import PairScores, read_scores, scores_file, scores_of_set, write_scores
from flax_pref.data.pipeline import InputConfig, PairBatches
from flax_pref.data.prepared import PreparedSet

COUNT, NAMES = 24, ("pickscore", "hpsv2.1", "judge", "aesthetic")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A set whose pairs four rewards have scored; some scores are equal, or not a number."""
    folder = tiny_set(tmp_path_factory.mktemp("scored") / "set", "sd15", COUNT)
    records, rng = PreparedSet(folder), np.random.default_rng(0)
    for name in NAMES:
        values = rng.integers([1, 0], [5, 4], (COUNT, 2)).astype(np.float32)
        values[rng.integers(COUNT), rng.integers(2)] = np.nan
        values[0] = 0, 1  # nobody agrees
        rows = np.arange(FIRST_ROW, FIRST_ROW + COUNT)
        write_scores(scores_file(folder, name), PairScores({"name": name}, records.fingerprint, rows, values))
    return records


def agreements(records, names):
    """How many rewards agree with the label of each pair, by a loop."""
    scores = [read_scores(scores_file(records.folder, name)).values for name in names]
    counts = []
    for pair in range(len(records)):
        count = 0
        for values in scores:
            winner, loser = map(float, values[pair])
            count += winner == winner and loser == loser and winner > loser
        counts.append(count)
    return counts


@pytest.mark.parametrize("least", [1, 2, 3, 4])
def test_the_pairs_on_which_enough_rewards_agree_are_kept(records, least):
    kept = Consensus(rewards=NAMES, least=least).select(records)
    expected = [pair for pair, count in enumerate(agreements(records, NAMES)) if count >= least]
    assert kept.indices.tolist() == expected and 0 < len(kept) == len(expected) < COUNT
    assert (kept.shapes, kept.image_size) == (records.shapes, records.image_size)
    for i, pair in enumerate(expected):
        one, other = kept.pair(i), records.pair(pair)
        assert one["row"] == FIRST_ROW + pair
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])


def test_all_rewards_must_agree_unless_fewer_are_asked_for_or_pairs_are_weighed(records):
    indices = Consensus(rewards=NAMES).select(records).indices.tolist()
    assert indices == Consensus(rewards=NAMES, least=len(NAMES)).select(records).indices.tolist()
    weighed = Consensus(rewards=NAMES, weigh=True).select(records)
    assert set(weighed.indices) == set(Consensus(rewards=NAMES, least=1).select(records).indices)


def test_an_epoch_has_a_weighed_pair_once_for_each_reward_that_agrees(records):
    for least in (1, 2):
        weighed = Consensus(rewards=NAMES, least=least, weigh=True).select(records)
        counts = agreements(records, NAMES)
        expected = {FIRST_ROW + pair: count for pair, count in enumerate(counts) if count >= least}
        with PairBatches(weighed, InputConfig(batch_size=len(weighed)), seed=0) as batches:
            first, second = (np.asarray(next(batches)["row"]) for _ in range(2))
        assert collections.Counter(first.tolist()) == collections.Counter(second.tolist()) == expected
        assert first.tolist() != second.tolist()


def test_batches_of_kept_pairs_resume_and_not_with_another_consensus(records):
    config = InputConfig(batch_size=4, caption_dropout=0.5)
    kept = Consensus(rewards=NAMES, least=2).select(records)
    with PairBatches(kept, config, seed=1) as batches:
        rows = [np.asarray(next(batches)["row"]).tolist() for _ in range(6)]
    with PairBatches(kept, config, seed=1) as batches:
        for _ in range(3):
            next(batches)
        state = batches.state()
    with PairBatches(Consensus(rewards=NAMES, least=2).select(records), config, seed=1) as batches:
        batches.restore(state)
        assert [np.asarray(next(batches)["row"]).tolist() for _ in range(3)] == rows[3:]
    for other in (Consensus(rewards=NAMES, least=1), Consensus(rewards=NAMES, least=2, weigh=True)):
        with PairBatches(other.select(records), config, seed=1) as batches, pytest.raises(ValueError, match="finger"):
            batches.restore(state)
    with PairBatches(records, config, seed=1) as batches, pytest.raises(ValueError, match="records"):
        batches.restore(state)


def test_what_is_kept_is_told_with_the_agreement_of_each_reward(records):
    two = ("judge", "pickscore")
    counts = agreements(records, two)
    told = Consensus(rewards=two).select(records).told
    kept = sum(count == 2 for count in counts)
    assert told.startswith(
        f"consensus: 2 of 2 rewards agree with the label on {100 * kept / COUNT:.1f} % of {COUNT} pairs ({kept} kept); "
        "agreement of each reward: judge "
    )
    values = scores_of_set(records, "judge")
    equal = int((values[:, 0] == values[:, 1]).sum())
    share = sum(agreements(records, ["judge"])) / COUNT
    assert f"judge {100 * share:.1f} % ({equal} equal, 1 not a number), pickscore " in told
    weighed = Consensus(rewards=two, weigh=True).select(records).told
    assert "at least 1 of 2 rewards agree" in weighed and f"weighed: {sum(counts)} in an epoch)" in weighed
    pairs = [np.array([[1, 0], [1, 0], [0, 1], [0, 0]]), np.array([[1, 0], [0, 1], [0, 1], [1, 0]])]
    assert told_counts(pairs) == "2 of 2 on 25.0 % (1), at least 1 on 75.0 % (3)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ("a", "b"), "least": 0}, "least is 0; expected 1 to 2, the number of its rewards"),
        ({"rewards": ("a", "b"), "least": 3}, "least is 3; expected 1 to 2, the number of its rewards"),
        ({"rewards": ("a", "a")}, "the reward 'a' is there twice"),
        ({"least": 2}, "least=2 without rewards"),
        ({"weigh": True}, "weigh without rewards"),
    ],
)
def test_a_consensus_that_cannot_be_is_refused_when_it_is_made(settings, message):
    with pytest.raises(ValueError, match=rf"^consensus: {message}"):
        Consensus(**settings)


def test_a_reward_that_has_not_scored_is_named_with_those_that_have_and_the_command(records, tmp_path):
    with pytest.raises(UserError) as told:
        Consensus(rewards=("judge", "imagereward")).select(records)
    assert str(told.value) == (
        f"{records.folder}: has no scores of 'imagereward'; there are scores of aesthetic, hpsv2.1, judge, pickscore: "
        f"score it with python -m sample.score {records.folder} --rewards imagereward"
    )
    unscored = PreparedSet(tiny_set(tmp_path / "set", "sd15", 4))
    with pytest.raises(UserError, match="has no scores of 'judge'; no reward has scored it: score it with"):
        Consensus(rewards=("judge",)).select(unscored)


def test_scores_of_another_set_and_damaged_ones_are_refused(records, tmp_path):
    other = PreparedSet(tiny_set(tmp_path / "set", "sd15", COUNT, mirrored=False))
    file = scores_file(other.folder, "judge")
    file.parent.mkdir()
    shutil.copy(scores_file(records.folder, "judge"), file)
    with pytest.raises(UserError, match=rf"^{file}: has the scores of another prepared set; score this one with"):
        Consensus(rewards=("judge",)).select(other)
    whole = file.read_bytes()
    for damage in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"^{file}: damaged \(.*\); remove it") as told:
            Consensus(rewards=("judge",)).select(other)
        assert "\n" not in str(told.value)


def test_a_consensus_that_keeps_nothing_and_pairs_in_memory_are_refused(records, tmp_path):
    folder = tiny_set(tmp_path / "set", "sd15", 3)
    values = np.tile(np.float32([0.0, 1.0]), (3, 1))
    fingerprint = PreparedSet(folder).fingerprint
    write_scores(scores_file(folder, "judge"), PairScores({}, fingerprint, np.arange(3), values))
    with pytest.raises(
        UserError, match=r"keeps no pair: 1 of 1 rewards agree .* none of 3; agreement of each reward: j"
    ):
        Consensus(rewards=("judge",)).select(PreparedSet(folder))
    with pytest.raises(UserError, match="needs a prepared set in a folder"):
        Consensus(rewards=NAMES).select(Consensus(rewards=NAMES).select(records))
    with pytest.raises(ValueError, match="no rewards"):
        Consensus().select(records)
