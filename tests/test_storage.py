"""Storage: what is saved comes back, a crash leaves the old file, bad data names its line."""

import datetime as dt
import json
import os
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Colour, Person
from test_records import json_data

import lmopt
from lmopt import (
    DataError,
    Params,
    ParamsError,
    Prompt,
    Record,
    diff,
    dumps,
    load,
    loads,
    predict,
    read_examples,
    save,
)

prompts = st.builds(
    Prompt,
    st.text(),
    st.lists(st.dictionaries(st.text(), json_data, max_size=3), max_size=3),
    st.dictionaries(st.text(), st.text(), max_size=2),
    st.none() | st.text(),
    st.fixed_dictionaries({}, optional={"temperature": st.floats(0, 2), "rollout": st.integers(0)}),
)
params_ = st.dictionaries(st.text(), prompts, max_size=3).map(Params)


@given(params_)
def test_saving_then_loading_is_the_identity(params):
    text = dumps(params)
    again = loads(text)
    assert again == params and dumps(again) == text and again.digest == params.digest
    assert list(again) == list(params)


@settings(max_examples=10)
@given(params_)
def test_a_file_holds_the_same_bytes_each_time(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("params") / "größe.json"
    save(params, path)
    first = path.read_bytes()
    save(load(path), path)
    assert path.read_bytes() == first and b"\r" not in first
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_the_file_as_it_is_read_by_people(golden):
    prompt = Prompt(
        "Answer.\nBe brief.", demos=[{"q": "é?", "a": [1]}], settings={"temperature": 0}
    )
    golden(
        "params.json",
        dumps(Params({"rag.hop": prompt, "b": Prompt(model="ft:x", texts={"a": "one word"})})),
    )


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "params.json"
    old, new = predict("q -> a").params, predict("q -> b").params
    save(old, path)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def broken(*args: object) -> None:
                raise OSError("disk full")

            patch.setattr(os, name, broken)
            with pytest.raises(OSError, match="disk full"):
                save(new, path)
        assert load(path) == old
        assert [one.name for one in tmp_path.iterdir()] == ["params.json"]


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "params.json"
    old = predict("q -> a").params
    save(old, path)
    with pytest.raises(DataError, match="a object has no JSON form"):
        save(old.replace("predict", demos=[{"q": object()}]), path)
    assert load(path) == old


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    save(predict("q -> a").params, target)
    link.symlink_to(target)
    save(predict("q -> b").params, link)
    assert link.is_symlink() and load(target) == predict("q -> b").params


GOOD = dumps(predict("q -> a").params)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "these are no parameters: ''; expected JSON; restore the file"),
        (GOOD[:-5], "expected JSON; restore the file .*line"),
        ("[1]", "expected format 'lmopt params 1'; save"),
        ("{}", "expected format 'lmopt params 1'"),
        (GOOD.replace("params 1", "params 9"), "expected format 'lmopt params 1'"),
        (
            GOOD.replace('"instructions"', '"demos"'),
            "a wrong prompt: .*; expected .*; correct it .*'predict'.*demos",
        ),
        (json.dumps({"format": "lmopt params 1"}), "a wrong prompt: None"),
        (
            json.dumps({"format": "lmopt params 1", "params": {"a": {"settings": {"x": 1}}}}),
            "unknown setting: 'x'",
        ),
        (GOOD.replace('"instructions"', '"instruction"'), "'instruction' is no part of a prompt"),
    ],
)
def test_a_corrupt_file_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "params.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    path = tmp_path / "params.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ParamsError, match="this is no text: .*; expected UTF-8; restore"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "other.json")


def test_diff_shows_what_changed(golden):
    old = Params({"a": Prompt("One.\nTwo."), "gone": Prompt("x")})
    new = Params(
        {
            "a": Prompt("One.\nThree.", demos=[{"q": "?"}], settings={"temperature": 1}),
            "new": Prompt("y"),
        }
    )
    assert diff(old, old) == ""
    golden("diff.txt", diff(old, new) + "\n")


# -- read_examples ---------------------------------------------------------------------------------

ROWS = (Record(text='a, "b"\nc', label="é"), Record(text="", label="x"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", '{"text": "a, \\"b\\"\\nc", "label": "é"}\n\n{"text": "", "label": "x"}\n'),
        ("d.jsonl", '\ufeff{"text": "a, \\"b\\"\\nc", "label": "é"}\r\n{"text": "", "label": "x"}'),
        ("d.json", '[{"text": "a, \\"b\\"\\nc", "label": "é"}, {"text": "", "label": "x"}]'),
        ("d.csv", 'text,label\n"a, ""b""\nc",é\n,x\n'),
        ("D.CSV", '\ufefftext,label\r\n"a, ""b""\nc",é\r\n\r\n,x'),
    ],
)
def test_reading_examples(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_examples(path) == ROWS == read_examples(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "d.jsonl",
            b'{"a": 1}\n\n{"a": \n',
            r"line 3: this is no JSON: '\{\"a\": '; expected one JSON object",
        ),
        ("d.jsonl", b'{"a": 1}\n[1]\n', "line 2: no JSON object: .*; wrap"),
        (
            "d.jsonl",
            b'{"a": 1}\n{"a": "\xff"}\n',
            "line 2 is no UTF-8: .*; expected UTF-8; convert",
        ),
        (
            "d.json",
            b'[{"a": 1},\n {"a": }]',
            "line 2: this is no JSON: .*; expected JSON; Expecting value",
        ),
        ("d.json", b'{"a": 1}', "line 1: no list: .*; expected a list of objects; wrap"),
        (
            "d.json",
            b"[" * 200_000,
            "lists in lists, too deep: .*; expected a list of objects; correct",
        ),
        (
            "d.jsonl",
            b'{"a":' * 200_000,
            "line 1: this is no JSON: .*; expected one JSON object; corr",
        ),
        ("d.json", b'[{"a": 1}, 2]', "item 1 is no object: 2; expected {...}; correct"),
        (
            "d.csv",
            b"a,b\n1,2\n1,2,3\n",
            r"line 3 has 3 cells: \['1', '2', '3'\]; expected 2: .*; quote the commas",
        ),
        ("d.csv", b"a,b\n1\n", "line 2 has 1 cells"),
        ("d.csv", b'a,b\n1,"2\n', "line 2 is no CSV: .*; correct"),
        (
            "d.csv",
            b"a,a\n1,2\n",
            r"line 1 names a column twice: \['a', 'a'\]; expected distinct names; rename",
        ),
        ("d.parquet", b"", r"unknown kind of file: .*; expected .csv, .json, .jsonl; convert"),
    ],
)
def test_bad_data_names_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert name in str(caught.value)


def test_empty_files(tmp_path):
    for name, content in (("d.jsonl", ""), ("d.csv", "a,b\n"), ("d.json", "[]")):
        (tmp_path / name).write_text(content)
        assert read_examples(tmp_path / name) == ()
    (tmp_path / "d.csv").write_text("")
    with pytest.raises(DataError, match="d.csv: an empty file: ''; expected a line with the names"):
        read_examples(tmp_path / "d.csv")
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none.csv")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_a_csv_file_is_read_whatever_parts_its_cells_and_however_long_they_are(tmp_path, mark):
    long = "a, b; c" * 30_000
    rows = f'review{mark}stars{mark}due\n"{long}"{mark}5{mark}2026-01-02\n"x"{mark}"7"{mark}\n'
    (tmp_path / "d.csv").write_text(rows)
    first, second = read_examples(tmp_path / "d.csv")
    assert first == {"review": long, "stars": "5", "due": "2026-01-02"}
    task = predict("review -> stars: int, due: date | None")
    typed = lmopt.check_dataset(task, [first, second])
    assert typed[0].stars == 5 and typed[0].due == dt.date(2026, 1, 2)
    assert (typed[1].stars, typed[1].due) == (7, "")


def test_typed_values_are_saved_as_they_are_written_to_an_lm(tmp_path):
    task = predict("text -> tags: list[str], n: int")
    params = task.params.replace("predict", demos=[{"text": "x", "tags": ["a"], "n": 2}])
    save(params, tmp_path / "p.json")
    assert task.with_params(load(tmp_path / "p.json"))(lmopt.toy_lm(), text="x") == {
        "tags": ["a"],
        "n": 2,
    }


def test_demos_with_typed_values_are_the_same_values_after_saving_and_loading(tmp_path):
    types = {"Person": Person, "Colour": Colour}
    task = predict("who: Person, day: date -> colour: Colour, all: set[int], n: int", types=types)
    values = {"who": Person("Ann", 7), "day": date(2026, 1, 2), "colour": Colour.RED, "all": {1, 2}}
    params = task.params.replace("predict", demos=[values, {"colour": "green", "n": "x"}])
    save(params, tmp_path / "p.json")
    loaded = task.with_params(load(tmp_path / "p.json"))
    assert loaded.params == params
    first, second = loaded.params["predict"].demos
    assert dict(first) == values and type(first["all"]) is set
    assert dict(second) == {"colour": "green", "n": "x"}  # what is no such value stays as it was


def test_demonstrations_that_moved_are_not_removed_and_added():
    rows = [lmopt.Record(q=str(n), a="x") for n in range(4)]
    task = lmopt.predict("q -> a")
    old = task.params.replace("predict", demos=rows)
    turned = old.replace("predict", demos=rows[::-1])
    assert lmopt.diff(old, turned) == "--- predict\n+++ predict\ndemonstrations in another order"
    fewer = old.replace("predict", demos=[rows[3], rows[0]])
    assert lmopt.diff(old, fewer).split("\n")[2:] == [
        '-demo: {"q": "1", "a": "x"}',
        '-demo: {"q": "2", "a": "x"}',
        "demonstrations in another order",
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("[]", "params are no object"),
        ("null", "params are no object"),
        ('{"a": {"instructions": "x"}, "a": {"instructions": "y"}}', "'a' stands there twice"),
        ('{"a": {"settings": {"temperature": NaN}}}', "a wrong temperature"),
        ('{"a": {"settings": {"temperature": "hot"}}}', "a wrong temperature"),
        ('{"a": {"settings": 5}}', "settings"),
        ('{"a": {"demos": [' + '{"x": ' * 600 + "1" + "}" * 600 + "]}}", "deeper than 100"),
    ],
)
def test_a_file_that_was_tampered_with_is_a_params_error(params, message):
    with pytest.raises(lmopt.ParamsError, match=message):
        lmopt.loads('{"format": "lmopt params 1", "params": ' + params + "}")


def test_a_diff_counts_demonstrations_and_leaves_instructions_alone():
    task, (x, y) = lmopt.predict("q -> a"), (lmopt.Record(q=one, a="b") for one in "xy")

    def shown(before, after):
        sides = (task.params.replace("predict", demos=one) for one in (before, after))
        return lmopt.diff(*sides).split("\n")[2:]

    assert shown([x, x, y], [x, y, y]) == [f"-demo: {x.to_json()}", f"+demo: {y.to_json()}"]
    assert shown([x, y], [x, x, y]) == [f"+demo: {x.to_json()}"]
    told = [task.params.replace("predict", instructions=one) for one in ("a\nb\nc", "a\nc\nb")]
    assert "demonstrations" not in lmopt.diff(*told) and "+c" in lmopt.diff(*told)
