"""Retrieval of one value among many: key-value pairs, and RULER's needles."""

from __future__ import annotations

import json
from pathlib import Path

import own_rows
import pytest
from conftest import SHARED_DATA
from own_rows import NEEDLES

from mikv.tasks.base import Sample
from mikv.tasks.key_value import LIKE_A_UUID, KeyValue, value_outcome
from mikv.tasks.ruler_file import RulerFile


def objects(sample: Sample) -> dict[str, str]:
    """The JSON object that stands in a prompt."""
    content = sample.messages[0]["content"]
    return json.loads(content[content.index("{") : content.index("}") + 1])


def test_objects_are_made_from_the_seed_and_a_larger_limit_only_adds() -> None:
    five = KeyValue(keys=8).samples(5, 3)
    assert KeyValue(keys=8).samples(2, 3) == five[:2]
    assert [sample.doc_id for sample in five] == list(range(5))
    assert not {sample.target for sample in KeyValue(keys=8).samples(5, 4)} & {sample.target for sample in five}


def test_the_prompt_is_the_published_one_around_an_object_that_holds_the_target() -> None:
    for sample in KeyValue(keys=8).samples(10, 0):
        held = objects(sample)
        assert len(held) == 8
        key = next(key for key, value in held.items() if value == sample.target)
        assert sample.messages[0]["content"].startswith(
            'Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"'
        )
        assert sample.question == f'Key: "{key}"\nCorresponding value:'
        assert sample.messages[0]["content"].endswith(f'"}}\n\n{sample.question}')
        assert sample.notes == {"keys": 8, "depth": list(held).index(key) / 7}
        assert all(LIKE_A_UUID.fullmatch(text) for text in [*held, *held.values()])
    assert {sample.notes["depth"] for sample in KeyValue(keys=2).samples(20, 0)} == {0.0, 1.0}


def test_the_layout_is_the_published_one_to_the_letter(tmp_path: Path) -> None:
    samples = KeyValue(data_dir=own_rows.write(tmp_path)).samples(None, 0)
    first = next(sample for sample in samples if sample.doc_id == 0)
    (k0, v0), (k1, v1), (k2, v2), (k3, v3) = NEEDLES
    listed = f'{{"{k0}": "{v0}",\n "{k1}": "{v1}",\n "{k2}": "{v2}",\n "{k3}": "{v3}"}}'
    assert f'JSON data:\n{listed}\n\nKey: "{k0}"\nCorresponding value:' in first.messages[0]["content"]
    assert (first.target, first.notes) == (v0, {"keys": 4, "depth": 0.0})


VALUE, OTHER, KEY = NEEDLES[0][1], NEEDLES[1][1], NEEDLES[0][0]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (VALUE, {"correct"}),
        (f"It is {VALUE.upper()}, not {OTHER}.", {"correct"}),
        (OTHER, {"confused"}),
        (f"The value of {KEY} is {OTHER.upper()}.", {"confused"}),
        (f"{OTHER[:-1]}", set()),  # cut off: no other value is told, and nothing is invented
        (f"{KEY}", set()),
        (f"{VALUE[:-1]}c", {"invented"}),
        (f"{OTHER} or 99999999-cccc-4ccc-8ccc-cccccccccccc", {"confused", "invented"}),
        ("1c3404e4-abcd7a8f", {"invented"}),  # garbled and short
        ("a well-added, dead-beef answer", set()),  # words
        ("I do not know.", set()),
        ("", set()),
    ],
)
def test_an_answer_is_right_or_confused_or_invented(answer: str, wanted: set[str], tmp_path: Path) -> None:
    values = [value for _, value in NEEDLES]
    scored = value_outcome(answer, VALUE, values, [text for needle in NEEDLES for text in needle])
    assert {name for name, value in scored.items() if value} == wanted
    data = own_rows.write(tmp_path)
    for task in (KeyValue(data_dir=data), RulerFile(data_dir=data)):
        sample = next(sample for sample in task.samples(None, 0) if sample.doc_id == 0)
        assert task.score(sample, answer) == scored
        assert set(scored) == {"correct", *task.flags}


def test_a_ruler_prompt_ends_in_its_answer_prefix(tmp_path: Path) -> None:
    for sample in RulerFile(data_dir=own_rows.write(tmp_path)).samples(None, 0):
        key, value = NEEDLES[sample.doc_id]
        row = own_rows.ROWS["ruler_4096/niah_multikey_3_first200.jsonl"][sample.doc_id]
        assert sample.messages[0]["content"] == f"{row['input']} {row['gen_prefix']}"
        assert sample.question == (
            f"What is the special magic uuid for {key} mentioned in the provided text? "
            f"The special magic uuid for {key} mentioned in the provided text is"
        )
        assert sample.target == value
        assert sample.notes == {"prompt_id": sample.doc_id, "keys": 4, "depth": sample.doc_id / 3}


def test_a_ruler_row_whose_answer_stands_nowhere_is_refused(tmp_path: Path) -> None:
    name = "ruler_4096/niah_multikey_3_first200.jsonl"
    data = own_rows.write(tmp_path, {name: [{**own_rows.ROWS[name][0], "outputs": ["elsewhere"]}]})
    with pytest.raises(ValueError, match="row 0: the answer is the value of no key"):
        RulerFile(data_dir=data).samples(None, 0)


def test_what_can_not_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.keys=1: from 2"):
        KeyValue(keys=1)
    with pytest.raises(ValueError, match=r"task\.keys=9 with task\.data_dir: the published samples have 75 keys"):
        KeyValue(keys=9, data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"task\.limit=null"):
        KeyValue().samples(None, 0)


@pytest.mark.skipif(not (SHARED_DATA / "ruler_4096").is_dir(), reason=f"published files are not in {SHARED_DATA}")
@pytest.mark.parametrize(
    "task", [KeyValue(data_dir=str(SHARED_DATA)), RulerFile(data_dir=str(SHARED_DATA))], ids=lambda t: t.name
)
def test_published_answers_are_right_and_stand_at_all_depths(task: KeyValue | RulerFile) -> None:
    samples = task.samples(None, 0)
    assert all(task.score(sample, f" {sample.target}.")["correct"] for sample in samples)
    depths = sorted(float(sample.notes["depth"]) for sample in samples)
    assert depths[0] < 0.05
    assert depths[-1] > 0.95
    assert {sample.notes["keys"] for sample in samples} == ({75} if task.name == "key_value" else {samples[0].notes["keys"]})
