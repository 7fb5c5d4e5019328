"""The sweep over prefix settings runs, goes on where it stopped, and reports what it found."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import sweep_prefix
import sweep_report
from sweep_prefix import Setting

RESULTS = Path(__file__).resolve().parent / "benchmarks" / "results"


@pytest.mark.thorough
def test_quick_sweep_and_its_continuation(tmp_path, capsys):
    arguments = ["--quick", "--threads", "1", "--runs", str(tmp_path / "runs.jsonl"), "--report", str(tmp_path)]
    report = sweep_prefix.main(arguments)
    assert json.loads(capsys.readouterr().out) == report
    assert [group["group"] for group in report["results"]] == ["start", "projection"]
    settings = [run["setting"] for group in report["results"] for run in group["runs"]]
    assert [setting["init"] for setting in settings] == ["0.5", "dialogue", "0.5", "0.5"]
    for group in report["results"]:
        for run in group["runs"]:
            assert 0 < run["validation_loss"] < 12
            assert set(run["exact"]) == {"train", "validation"}
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3  # the base setting is in both groups, and runs once
    assert (tmp_path / "sweep_prefix.png").read_bytes().startswith(b"\x89PNG")
    # A sweep that was stopped makes the missing runs only.
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    again = sweep_prefix.main(arguments)
    assert "run 1 of 1: " in capsys.readouterr().err
    exact = [[run["exact"] for group in each["results"] for run in group["runs"]] for each in (report, again)]
    assert exact[0] == exact[1]


def test_the_plan_varies_one_thing_at_a_time():
    for group, settings in sweep_prefix.plan().items():
        assert len(set(settings)) == len(settings) >= 2, group
        varied = {
            name for name in Setting.__dataclass_fields__ if len({getattr(setting, name) for setting in settings}) > 1
        }
        assert varied == set(sweep_report.VARIED[group])


def make_run(exact, **options):
    setting = sweep_prefix.asdict(Setting(steps=100, questions=100, **options))
    return {"setting": setting, "exact": {"train": exact, "validation": exact // 2}, "validation_loss": 0.25}


def test_tables():
    stopped = {"setting": sweep_prefix.asdict(Setting(steps=100, questions=100, init="dialogue")), "exact": {}}
    groups = [{"group": "start", "runs": [make_run(90, init="0.5"), stopped]}]
    table = sweep_report.format_tables(groups)
    assert "### Start, 100 steps, 100 questions of each kind" in table
    assert "| N(0, 0.5²) | 90.0% (82.6% to 94.5%) | 45.0% (35.6% to 54.8%) | 0.250 |" in table
    assert "| text: dialogue | – | – | stopped |" in table
    assert sweep_report.name_setting("projection", make_run(1, projection=True)["setting"]) == "projection, 0.15"
    assert sweep_report.name_setting("warm-up", make_run(1, warmup=0.1)["setting"]) == "10%"


def test_the_results_in_the_repository_are_those_of_the_plan():
    runs = [json.loads(line) for line in (RESULTS / "sweep_prefix.jsonl").read_text(encoding="utf-8").splitlines()]
    finished = {Setting(**run["setting"]).key: run for run in runs}
    wanted = {setting.key for settings in sweep_prefix.plan().values() for setting in settings}
    assert wanted <= finished.keys()
    groups = list(sweep_prefix.collect(sweep_prefix.plan(), finished))
    assert (RESULTS / "sweep_prefix.md").read_text(encoding="utf-8") == sweep_report.format_tables(groups)
    assert (RESULTS / "sweep_prefix.png").stat().st_size < 200_000
