"""Assignments of experts: clients' reports are stored, and a restart repeats the decision."""

import math

import msgspec
import pytest
import toy_run
from toy_run import Toy, make_run

from edgefed.errors import InvalidUpdate
from edgefed.protocol.messages import ExpertAssignment, ExpertSurvey, decode_message, encode_message


def survey(expert: float | None, **changes) -> ExpertSurvey:
    """The toy method assigns the expert whose number is the first utility."""
    utility = ((expert, None, 0.0), (None, None, None))
    facts = {"utility": utility, "frequency": ((0.5, 0.5, 1.0), (0.0, 1.0, 1.0)), "tune_slots": 2}
    return ExpertSurvey(**{**facts, **changes})


@pytest.fixture
def toy(tmp_path):
    toy = Toy(make_run(tmp_path / "state", options={"assigns": True}, rounds=4))
    toy.join("a", "b")
    yield toy
    toy.close()


def finish_round(toy: Toy, surveys: dict[str, ExpertSurvey | None], units: int = 1) -> None:
    manifest = toy.manifest()
    chosen = [unit for unit in manifest.units if unit.trainable and unit.kind == "expert"][:units]
    for client, said in surveys.items():
        toy.send(toy_run.make_update(manifest, client, toy_run.trained(chosen, 1), survey=said))
    toy.run.fold_pending()


def test_a_survey_leads_to_an_assignment_in_the_next_round(toy):
    assert toy.assignment("a").experts is None
    finish_round(toy, {"a": survey(2.0), "b": None})
    found = toy.assignment("a").experts
    assert isinstance(found, ExpertAssignment)
    assert found.tune == ((0, 2),)
    assert toy.assignment("b").experts is None, "it has said nothing"
    everything_but_one = {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)}
    assert set(found.explore) == everything_but_one, "expert 0 of layer 0 was trained in round 1, the others never"


def test_an_older_utility_is_reused(toy):
    finish_round(toy, {"a": survey(2.0), "b": survey(1.0)})
    finish_round(toy, {"a": survey(None), "b": survey(0.0)})
    assert toy.assignment("a").experts.tune == ((0, 2),)
    assert toy.assignment("b").experts.tune == ((0, 0),)


def test_an_older_rate_is_reused_until_the_next_measurement(toy):
    known = {"upload_bytes_per_s": 2e6, "download_bytes_per_s": 9e6}
    finish_round(toy, {"a": survey(2.0, train_slots=2, **known), "b": survey(1.0)})
    finish_round(toy, {"a": survey(None), "b": survey(1.0, upload_bytes_per_s=5e6)})
    surveys = {client: record.survey for client, record in toy.run.clients.items()}
    assert (surveys["a"].upload_bytes_per_s, surveys["a"].train_slots) == (2e6, None)
    assert surveys["a"].download_bytes_per_s == 9e6
    assert surveys["b"].upload_bytes_per_s == 5e6
    finish_round(toy, {"a": survey(2.0, upload_bytes_per_s=1e6), "b": None})
    assert toy.run.clients["a"].survey.upload_bytes_per_s == 1e6


def test_the_survey_of_an_older_client_is_accepted():
    said = msgspec.to_builtins(survey(1.0))
    del said["upload_bytes_per_s"], said["download_bytes_per_s"], said["train_slots"]
    assert decode_message(encode_message(said), ExpertSurvey) == survey(1.0)


def test_a_restart_within_a_round_repeats_its_assignments(toy):
    finish_round(toy, {"a": survey(2.0), "b": survey(1.0)})
    before = toy.assignment("b").experts
    toy.send(toy.update("a", 5, survey=survey(0.0)))
    again = toy.reopen()
    assert again.assignment("b").experts == before
    again.join("a")
    assert again.run.clients["a"].survey == survey(2.0), "registering again forgets nothing"
    again.send(again.update("b", 6))
    again.run.fold_pending()
    assert again.assignment("a").experts.tune == ((0, 0),), "what it said in round 2 counts from round 3 on"
    again.close()


def test_methods_without_assignments_send_none(tmp_path):
    toy = Toy(make_run(tmp_path / "state"))
    toy.join("a", "b")
    finish_round(toy, {"a": survey(2.0), "b": survey(1.0)})
    assert toy.assignment("a").experts is None
    toy.close()


def test_a_paced_run_limits_what_clients_train_by_their_rates(tmp_path):
    """a sends its 6 in 6 s, b in 24 s; the pace is 0.5 x 12 s, in which b sends 1.5 of them."""
    toy = Toy(make_run(tmp_path / "state", rounds=4, pace=0.5, min_clients=3))
    toy.join("a", "b", "c")
    assert toy.assignment("a").train_limit == 1, "2 % of 6, before anything is known"
    known = {name: survey(None, tune_slots=6, upload_bytes_per_s=rate) for name, rate in (("a", 1e6), ("b", 25e4))}
    finish_round(toy, {**known, "c": survey(None, tune_slots=6)})
    assert [toy.assignment(name).train_limit for name in ("a", "b", "c")] == [None, 1, None]
    assert toy.assignment("a").experts is None
    again = toy.reopen()
    assert again.assignment("b").train_limit == 1
    again.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utility": ((1.0,), (1.0,))}, r"utility has rows of \[1, 1\] numbers, the layers have \[3, 3\] experts"),
        ({"frequency": ((0.1,) * 3,)}, "frequency has rows of"),
        ({"frequency": ((0.1, 0.2, 1.5), (0.0,) * 3)}, "a frequency is above 1"),
        ({"utility": ((-1.0, 0.0, 0.0), (None,) * 3)}, "utility has the value -1.0"),
        ({"tune_slots": 1}, r"tune_slots is 1, expected 2\.\.6"),
        ({"tune_slots": 7}, "tune_slots is 7"),
        ({"train_slots": 0}, r"train_slots is 0, expected 1\.\.6"),
        ({"train_slots": 7}, "train_slots is 7"),
        ({"upload_bytes_per_s": 0.0}, "upload_bytes_per_s is 0.0"),
        ({"upload_bytes_per_s": -1e6}, "upload_bytes_per_s is -1000000.0"),
        ({"upload_bytes_per_s": 1e16}, "upload_bytes_per_s is 1e"),
        ({"upload_bytes_per_s": math.inf}, "upload_bytes_per_s is inf"),
        ({"upload_bytes_per_s": math.nan}, "upload_bytes_per_s is nan"),
        ({"download_bytes_per_s": 0.5}, "download_bytes_per_s is 0.5"),
    ],
)
def test_impossible_surveys_are_refused(toy, changes, message):
    with pytest.raises(InvalidUpdate, match=message):
        toy.send(toy.update("a", 1, survey=survey(1.0, **changes)))
