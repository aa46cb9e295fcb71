"""A part of `python -m tests.campaign`: bad inputs end in one line, and no secret or leftover stays."""

import pytest
from campaign import kills, params_cases, properties, service_cases, source_cases
from campaign.case import BAD, Case, Tally, judge, run_all


def bad(cases, folder) -> list[str]:
    tally = Tally()
    run_all(cases, folder, tally)
    assert any(counts.total() for counts in tally.counts.values())
    return tally.problems


def test_every_key_of_params_yaml_refuses_other_types(tmp_path):
    """Every ninth case; the campaign has all."""
    assert bad(list(params_cases.cases())[::9], tmp_path) == []


def test_photos_and_archives_are_refused_or_set_aside(tmp_path):
    assert bad(list(source_cases.cases())[::2], tmp_path) == []


def test_answers_of_a_service_are_refused_or_set_aside(tmp_path):
    chosen = [
        case for case in service_cases.cases() if not any(slow in case.name for slow in ("drip", "silence", "endless"))
    ]
    assert bad(chosen[::4], tmp_path) == []


def test_dripping_servers_are_given_up(tmp_path):
    dripping = (
        "archive: a dripping header",
        "knn-service: dripping headers",
        "image of a knn-service: a dripping body",
    )
    assert bad([case for case in service_cases.cases() if case.name in dripping], tmp_path) == []


@pytest.mark.parametrize("name", properties.PROPERTIES)
def test_no_input_breaks_a_property(name):
    assert properties.check(name, seed=0, examples=30)[1] == ""


def test_the_campaign_finds_what_it_looks_for(tmp_path):
    """A traceback, a hang, a wrong success, and a line that names something else."""

    def case(expected: str, act=lambda: None) -> Case:
        return Case("x", "x", act, expected)

    line = "error: train.max_steps: must be above 0\n"
    assert judge(case("max_steps"), 1, line) == "one line"
    assert judge(case("batch_size"), 1, line) == "wrong"
    assert judge(case("max_steps"), 1, line + "more\n") == "wrong"
    assert judge(case("max_steps"), 0, "") == "wrongly accepted"
    assert judge(case(""), 0, "") == "set aside"
    assert judge(case(""), None, "") == "hang"
    tally = Tally()
    run_all([case("", lambda: 1 // 0)], tmp_path, tally)
    assert tally.counts["x"]["traceback"] == 1
    assert "ZeroDivisionError" in tally.problems[0]
    assert all(kind in BAD for kind in ("traceback", "hang", "wrong", "wrongly accepted"))


def test_the_schedule_of_kills_is_seeded_and_reaches_every_stage():
    assert kills.schedule(5, 50) == kills.schedule(5, 50) != kills.schedule(6, 50)
    assert {kill.stage for kill in kills.schedule(1, 10)} == set(kills.STAGES)
