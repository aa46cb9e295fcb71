"""Prompt files are read as they are documented, and a template takes a subject for each concept."""

import pytest
from conftest import concept_values

from customdiff.config import Concept, Evaluate
from customdiff.errors import UserError
from customdiff.evaluation import drift, prompts
from customdiff.evaluation.prompts import Prompt


def concept(class_prompt, token="<new1>"):
    return Concept.model_validate(concept_values(token, class_prompt))


PAIR = {"tom": concept("cat"), "pot": concept("wooden pot", "<new2>")}


def test_each_concept_has_its_place_in_the_text():
    assert Prompt("a {} beside a {}", ("tom",)).fill("cat") == "a cat beside a cat"
    assert Prompt("a {2} on a {1}", ("tom", "pot")).fill("cat", "wooden pot") == "a wooden pot on a cat"
    assert Prompt("a {2} on a {1} in {3}", ("tom", "pot")).fill("{2} {}", "{1} {x}") == "a {1} {x} on a {2} {} in {3}"


def test_the_label_names_all_concepts():
    assert Prompt("a {}", ("tom",)).concept_label == "tom"
    assert Prompt("a {1} and a {2}", ("tom", "pot")).concept_label == "tom+pot"


def test_a_line_has_a_kind_or_not_and_comments_and_repetitions_are_left_out(tmp_path):
    (tmp_path / "wooden_pot.txt").write_text(
        "# ours\n\nscene: a {} on the grass # like this\na {}: a study\nstyle:{}\nscene: a {} on the grass\n"
    )
    assert prompts.read_prompts(tmp_path, "pot", {"pot": concept("wooden pot")}) == [
        Prompt("a {} on the grass", ("pot",), "scene"),
        Prompt("a {}: a study", ("pot",), "other"),
        Prompt("{}", ("pot",), "style"),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    (tmp_path / "cat.txt").write_text("scene: a {} on the grass\n", encoding="utf-8-sig")
    assert prompts.read_prompts(tmp_path, "tom", PAIR) == [Prompt("a {} on the grass", ("tom",), "scene")]
    (tmp_path / "drift.txt").write_text("a dog\n", encoding="utf-8-sig")
    settings = Evaluate(prompts=str(tmp_path), drift_prompts=1)
    assert drift.control_prompts(settings, PAIR, []) == [Prompt("a dog", (), "other")]


def test_a_class_without_a_file_of_its_own_has_the_default_prompts(tmp_path):
    (tmp_path / "default.txt").write_text("a {}\n")
    (tmp_path / "dog.txt").write_text("the {}\n")
    assert prompts.read_prompts(tmp_path, "tom", {"tom": concept("cat")}) == [Prompt("a {}", ("tom",))]
    assert prompts.read_prompts(tmp_path, "rex", {"rex": concept("dog")}) == [Prompt("the {}", ("rex",))]


@pytest.mark.parametrize("name", ["x" * 300, "../../etc/passwd", "a/b"])
def test_a_class_that_is_no_file_name_has_the_default_prompts(tmp_path, name):
    (tmp_path / "default.txt").write_text("a {}\n")
    assert prompts.read_prompts(tmp_path, "tom", {"tom": concept(name)}) == [Prompt("a {}", ("tom",))]


def test_joint_prompts_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "together.txt").write_bytes(b"\xff{1} {2}")
    with pytest.raises(UserError, match=r"evaluate\.prompts: .*together\.txt"):
        prompts.read_joint_prompts(tmp_path, ("tom", "pot"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, r"^evaluate\.prompts: .*cat\.txt.*default\.txt"),
        (b"\xff\xfe", r"^evaluate\.prompts"),
        (b"# nothing\n", r"cat\.txt"),
        (b"a {}\n\nscene: a cat\n", r"cat\.txt: line 3: .*\{\}.*'scene: a cat'"),
    ],
)
def test_a_mistake_in_a_prompt_file_is_named_in_one_line(tmp_path, text, named):
    if text is not None:
        (tmp_path / "cat.txt").write_bytes(text)
    with pytest.raises(UserError, match=named) as error:
        prompts.read_prompts(tmp_path, "tom", {"tom": concept("cat")})
    assert "\n" not in str(error.value)


def test_joint_prompts_are_those_with_as_many_placeholders_as_there_are_concepts(tmp_path):
    (tmp_path / "default.txt").write_text("a {}\n")
    (tmp_path / "together.txt").write_text("scene: a {2} on a {1}\na {1}, a {2} and a {3}\n")
    concepts = {"tom": concept("cat"), "pot": concept("wooden pot", "<new2>"), "rex": concept("dog", "<new3>")}
    two = {name: concepts[name] for name in ("tom", "pot")}
    single = [Prompt("a {}", ("tom",)), Prompt("a {}", ("pot",))]
    assert prompts.read_all_prompts(tmp_path, two) == [*single, Prompt("a {2} on a {1}", ("tom", "pot"), "scene")]
    assert prompts.read_all_prompts(tmp_path, concepts)[3:] == [Prompt("a {1}, a {2} and a {3}", ("tom", "pot", "rex"))]
    assert prompts.read_all_prompts(tmp_path, {"tom": concepts["tom"]}) == single[:1]
    (tmp_path / "together.txt").unlink()
    assert prompts.read_all_prompts(tmp_path, two) == single


def test_a_joint_prompt_needs_two_placeholders(tmp_path):
    (tmp_path / "together.txt").write_text("a {1}\n")
    with pytest.raises(UserError, match=r"together\.txt: line 1: .*\{2\}"):
        prompts.read_joint_prompts(tmp_path, PAIR)


def test_a_token_that_no_concept_has_is_named_with_file_and_line(tmp_path):
    (tmp_path / "default.txt").write_text("a {}\na {} <3 a <new2> wooden pot\n")
    (tmp_path / "together.txt").write_text("# both\na {1} on a {2}\na {1}, a {2} and <new3>\n")
    with pytest.raises(UserError, match=r"default\.txt: line 2: names <new2>.*tokens: <new1>\)") as error:
        prompts.read_all_prompts(tmp_path, {"tom": PAIR["tom"]})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"together\.txt: line 3: names <new3>.*tokens: <new1>, <new2>\)"):
        prompts.read_all_prompts(tmp_path, PAIR)


@pytest.mark.parametrize(
    ("folder", "missing"),
    [("data/prompts", {"companion"}), ("data/prompts/sd", set())],  # the embedded base cannot show two subjects
)
def test_the_projects_prompt_files_have_every_kind(folder, missing, pytestconfig):
    files = sorted((pytestconfig.rootpath / folder).glob("*.txt"))
    assert len(prompts.read_joint_prompts(pytestconfig.rootpath / folder, PAIR)) == 6
    for other in (prompts.JOINT_FILE, drift.FILE):
        files.remove(pytestconfig.rootpath / folder / other)
    assert "default" in {file.stem for file in files}
    for file in files:
        found = prompts.read_prompts(file.parent, "tom", {"tom": concept(file.stem)})
        assert {prompt.kind for prompt in found} == set(prompts.KINDS) - missing, file
        assert len(found) >= 12, file
        assert all(prompt.template.count("{}") == 1 for prompt in found)
