"""`vwlmm evaluate`."""

import json

import pytest

from helpers.adapters import train
from helpers.command_line import error_of
from modeling_vwlmm.cli import main


@pytest.fixture
def arguments(model_folder, data):
    return [str(model_folder), "--dataset", str(data), "--image_folder", str(data.parent / "images")]


def test_evaluate_prints_a_table_and_writes_answers_and_figures(arguments, model_folder, data, capsys):
    records = json.loads(data.read_text())
    for record in records:
        record["kind"] = "first" if record["id"] == "a0" else "other"
    data.write_text(json.dumps(records))
    main(["evaluate", *arguments, "--by", "kind", "--max-new-tokens", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["right", "overall", "first", "other"]
    answers = (model_folder / "answers-data.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in answers) == ["a0", "a1", "a2", "a3"]
    results = json.loads((model_folder / "eval_results.json").read_text())
    names = [result["metric_name"] for result in results]
    assert names == ["right answers", "right answers, first", "right answers, other"]


def test_an_adapter_answers_for_itself(tmp_path, data):
    train(tmp_path)
    images = ["--image_folder", str(data.parent / "images"), "--max-new-tokens", "4"]
    for name, more in (("plain", []), ("adapted", ["--adapter", str(tmp_path / "adapter")])):
        output = ["--output", str(tmp_path / name)]
        main(["evaluate", str(tmp_path / "base"), "--dataset", str(data), *images, *output, *more])
    said = [(tmp_path / name / "answers-data.jsonl").read_text().splitlines() for name in ("plain", "adapted")]
    assert [json.loads(line)["answer"] for line in said[0]] != [json.loads(line)["answer"] for line in said[1]]


def test_one_line_says_what_does_not_fit(arguments, data, tmp_path, capsys, caplog):
    metric = error_of(capsys, "evaluate", *arguments, "--metric", "vqa_accuracy")
    assert "4 or more a question, and a question has 1" in metric
    assert 'no column "sort", expected one of' in error_of(capsys, "evaluate", *arguments, "--by", "sort")
    records = json.loads(data.read_text())
    data.write_text(json.dumps([{**record, "conversations": record["conversations"][:1]} for record in records]))
    assert "data.json: sample 0 has no answer to compare with" in error_of(capsys, "evaluate", *arguments)
    (data.parent / "images" / "1.png").write_bytes(b"no image")
    data.write_text(json.dumps(records))
    main(["evaluate", *arguments, "--max-new-tokens", "2"])
    assert capsys.readouterr().out.splitlines()[2].split()[-2:] == ["1", "1"]  # a question about an image
    assert caplog.records[-1].getMessage().startswith("skipped: sample a1: image ")
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *arguments, "--limit", "0"])


def test_the_limits_report_has_a_page_and_figures_for_the_card(arguments, model_folder, data, capsys):
    train = ["--train-dataset", str(data), "--max-new-tokens", "2"]
    main(["evaluate", *arguments, "--limits", *train])
    assert "# Limits of model" in capsys.readouterr().out
    assert (model_folder / "limits.md").is_file() and (model_folder / "assets" / "limits.png").is_file()
    results = json.loads((model_folder / "eval_results.json").read_text())
    assert {result["dataset_split"] for result in results} == {"held out", "training"}
    error = error_of(capsys, "evaluate", *arguments, "--limits", "--retrained", str(model_folder))
    assert "reads features, expected a model trained with pseudo_image_features" in error
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *arguments, *train])
