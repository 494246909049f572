"""What other tools read: shapes, directions, nothing invented for a null, never NaN."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from infopt import figures
from infopt.comparison import Comparison
from infopt.errors import InputError
from infopt.judgement import Verdict
from infopt.report import exports
from infopt.report.exports import FORMATS, export
from infopt.report.junit import junit_xml
from infopt.result import Run


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def load(text: str) -> Any:
    return json.loads(text, parse_constant=refuse_constant)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_makes_text_without_nan(comparison: Comparison, name: str) -> None:
    for file, text in export(comparison, name).items():
        assert text.endswith("\n")
        assert not re.search(r"(?<![a-z])(nan|inf|NaN|Infinity|None)(?![a-z])", text), file
        if file.endswith(".json"):
            load(text)


def test_unknown_format_is_refused_with_the_nearest(run: Run) -> None:
    with pytest.raises(InputError, match="did you mean 'junit'"):
        export(run, "junitt")


@pytest.mark.parametrize("name", ["junit", "html"])
def test_a_run_has_no_verdicts_to_export(run: Run, name: str) -> None:
    with pytest.raises(InputError, match="a single run has none"):
        export(run, name)


@pytest.mark.parametrize("name", ["markdown", "json", "csv", "benchmark-action", "bmf", "openmetrics"])
def test_a_run_exports(run: Run, name: str) -> None:
    assert all(export(run, name).values())


def test_stored_document_reads_back(comparison: Comparison, run: Run) -> None:
    assert Comparison.model_validate_json(export(comparison, "json")["compare.json"]) == comparison
    assert Run.model_validate_json(export(run, "json")["run.json"]) == run


def test_benchmark_action_has_one_direction_per_file(comparison: Comparison) -> None:
    made = export(comparison, "benchmark-action")
    smaller, bigger = (load(made[f"benchmark-{word}-is-better.json"]) for word in ("smaller", "bigger"))
    by_name = {entry["name"]: entry for entry in smaller}
    assert by_name["int8: tpot_s.p50"] == {"name": "int8: tpot_s.p50", "unit": "s", "value": 0.0641, "extra": "tpot_s.v1"}
    assert by_name["nf4: ppl_ratio"]["range"] == "± 0.011"
    for entries, better in ((smaller, "lower"), (bigger, "higher")):
        assert {figures.find(entry["name"].split(": ")[1])[0].better for entry in entries} == {better}
    names = [entry["name"] for entry in smaller + bigger]
    assert len(names) == len(set(names))
    assert not any("energy" in name for name in names)


def test_bmf_carries_intervals(comparison: Comparison) -> None:
    found = load(export(comparison, "bmf")["bencher.json"])
    assert list(found) == [arm.label for arm in comparison.arms]
    assert found["nf4"]["ppl_ratio"] == {"value": 1.041, "lower_value": 1.03, "upper_value": 1.052}
    assert found["nf4"]["tpot_s.p50"] == {"value": 0.0508}
    assert "energy_j_per_token" not in found["nf4"]


def test_openmetrics_families_stand_together_and_end(comparison: Comparison) -> None:
    text = export(comparison, "openmetrics")["metrics.txt"]
    assert text.endswith("\n# EOF\n")
    assert 'infopt_tpot_seconds{arm="int8",id="tpot_s.v1",statistic="p50"} 0.0641\n' in text
    assert "infopt_weights_bytes{" in text
    order = [
        re.split(r"[ {]", line.removeprefix("# TYPE ").removeprefix("# UNIT ").removeprefix("# HELP "))[0]
        for line in text.splitlines()[:-1]
    ]
    starts = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(starts) == len(set(starts))
    for line in text.splitlines():
        if line.startswith("# UNIT"):
            _, _, name, unit = line.split()
            assert name.endswith(f"_{unit}")


def test_openmetrics_names_are_legal_and_distinct() -> None:
    names = [exports._metric(figure)[0] for figure in figures.FIGURES.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"infopt_[a-z][a-z0-9_]*", name) for name in names)
    by_figure = dict(zip(figures.FIGURES, names, strict=True))
    assert by_figure["decode_tok_per_s"] == "infopt_decode_tokens_per_second"
    assert by_figure["energy_j_per_token"] == "infopt_energy_joules_per_token"
    assert by_figure["ppl_ratio"] == "infopt_ppl_ratio"
    assert by_figure["power_w"] == "infopt_power_watts"


def test_openmetrics_quotes_labels(comparison: Comparison) -> None:
    arm = comparison.arms[0].model_copy(update={"label": 'a"b\\c\nd'})
    text = export(comparison.model_copy(update={"arms": (arm,)}), "openmetrics")["metrics.txt"]
    assert 'arm="a\\"b\\\\c\\nd"' in text


def test_csv_keeps_nulls_with_their_reason(comparison: Comparison) -> None:
    made = export(comparison, "csv")
    rows = list(csv.DictReader(io.StringIO(made["figures.csv"])))
    energy = next(row for row in rows if row["figure"] == "energy_j_per_token")
    assert (energy["value"], energy["reason"]) == ("", "no energy counter is readable here")
    assert len(rows) == sum(len(arm.figures) for arm in comparison.arms)
    judged = list(csv.DictReader(io.StringIO(made["judgements.csv"])))
    assert len(judged) == sum(map(len, comparison.judgements.values()))
    assert judged[1]["verdict"] == "FAIL"
    assert float(judged[1]["effect"]) == pytest.approx(0.402 / 0.380)


def test_figures_of_another_catalogue_are_left_out_of_metrics(run: Run) -> None:
    value = run.figures["tpot_s.p50"]
    newer = run.model_copy(update={"figures": {"tpot_s.p50": value, "future_s.p50": value}})
    assert list(load(export(newer, "bmf")["bencher.json"])["int8"]) == ["tpot_s.p50"]
    assert "future_s.p50" in export(newer, "csv")["figures.csv"]


# --- JUnit -----------------------------------------------------------------------------------------------------------


def suites(comparison: Comparison) -> ElementTree.Element:
    """Parsed, with every count checked against its test cases."""
    root = ElementTree.fromstring(junit_xml(comparison))
    assert root.tag == "testsuites"
    for element in (root, *root):
        cases = list(element.iter("testcase"))
        for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert element.get(count) == str(sum(case.find(tag) is not None for case in cases))
        assert element.get("tests") == str(len(cases))
    for case in root.iter("testcase"):
        assert case.get("classname")
        assert case.get("name")
    return root


def kind(case: ElementTree.Element) -> str:
    return next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")


@pytest.mark.parametrize("zone", ["Z", "+00:00"])
def test_junit_times_have_no_zone(comparison: Comparison, zone: str) -> None:
    made = junit_xml(comparison.model_copy(update={"created_utc": f"2031-01-01T10:15:00{zone}"}))
    assert 'timestamp="2031-01-01T10:15:00"' in made


def test_junit_has_one_case_per_gate(comparison: Comparison) -> None:
    root = suites(comparison)
    assert [suite.get("name") for suite in root] == ["int8", "nf4", "rtn_int4+prompt_lookup", "int8_naive"]
    kinds = [[kind(case) for case in suite.iter("testcase")] for suite in root]
    assert kinds == [
        ["passed", "failure", "passed"],
        ["passed", "skipped", "passed"],
        ["passed", "skipped", "failure"],
        ["passed", "passed", "failure"],
    ]
    failure = root.find("./testsuite[@name='int8']/testcase/failure")
    assert failure is not None
    assert failure.get("message") == "FAIL: effect 1.058×, interval 1.039 to 1.077× at 97.5 %"


def test_junit_skips_what_is_not_comparable(comparison: Comparison) -> None:
    judged = comparison.judgements["int8"][2].model_copy(update={"verdict": Verdict.NOT_COMPARABLE, "note": "cpu differs"})
    root = suites(comparison.model_copy(update={"judgements": {"int8": (judged,)}}))
    skipped = root.find(".//skipped")
    assert skipped is not None
    assert "NOT COMPARABLE" in str(skipped.get("message"))
    assert "cpu differs" in str(skipped.get("message"))


def test_junit_reports_errors_and_cleans_text(comparison: Comparison) -> None:
    dead = comparison.arms[1].model_copy(update={"error": "died\x00\x1b[31m"})
    arms = (comparison.arms[0].model_copy(update={"error": "gone"}), dead)
    root = suites(
        comparison.model_copy(update={"arms": arms, "judgements": {}, "is_complete": False, "incomplete_reason": "interrupted"})
    )
    messages = [str(error.get("message")) for error in root.iter("error")]
    assert messages == ["died[31m", "gone", "interrupted"]
