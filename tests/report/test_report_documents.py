"""Markdown, step summaries, HTML and the README's generated tables."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from infopt.comparison import Comparison
from infopt.errors import InputError
from infopt.judgement import Verdict
from infopt.report import forest, github, readme, summary
from infopt.report.html import comparison_html
from infopt.report.markdown import STEP_SUMMARY_BYTES, comparison_report, run_report, step_summary
from infopt.result import Run, dump


def test_markdown_looks_as_it_should(comparison: Comparison, run: Run, golden: Any) -> None:
    golden("comparison.md", comparison_report(comparison))
    golden("run.md", run_report(run))


def test_the_verdict_comes_first(comparison: Comparison, passing: Comparison) -> None:
    assert comparison_report(comparison).startswith("# FAIL: 4 candidates against baseline\n\n- **FAIL**: int8 (ttft_s.p50)")
    assert comparison_report(passing).startswith("# PASS: int8 against baseline\n\n- **PASS**: int8\n")


def test_headline_of_what_is_no_verdict(comparison: Comparison) -> None:
    assert comparison_report(comparison.model_copy(update={"judgements": {}})).startswith("# NO GATES: ")
    assert comparison_report(comparison.model_copy(update={"is_complete": False})).startswith("# INCOMPLETE: ")
    informing = comparison.judgements["int8"][2].model_copy(
        update={"verdict": Verdict.NOT_COMPARABLE, "note": "cpu: 'a' against 'b'"}
    )
    other = comparison_report(comparison.model_copy(update={"judgements": {"int8": (informing,)}}))
    assert other.startswith("# NOT COMPARABLE: ")
    assert "int8 (cpu: 'a' against 'b')" in other


def test_cells_cannot_break_a_table(comparison: Comparison) -> None:
    arm = comparison.arms[0].model_copy(update={"label": "a|b\n<script>"})
    text = comparison_report(comparison.model_copy(update={"arms": (arm, *comparison.arms[1:])}))
    assert "| a\\|b &lt;script> |" in text
    assert "<script>" not in text


def test_command_is_the_recorded_one_or_made_from_the_arms(comparison: Comparison, run: Run) -> None:
    assert "$ infopt compare demo:baseline demo:int8 demo:nf4" in comparison_report(comparison)
    recorded = comparison.model_copy(update={"settings": {"command": ["infopt", "compare", "a b", "c"]}})
    assert "$ infopt compare 'a b' c\n" in comparison_report(recorded)
    assert "$ infopt bench demo --recipe int8 --engine transformers" in run_report(run)


def test_step_summary_drops_details_before_it_cuts(comparison: Comparison) -> None:
    whole = comparison_report(comparison)
    assert step_summary(comparison) == whole
    without = step_summary(comparison, STEP_SUMMARY_BYTES - len(whole.encode()) + 1)
    assert len(without) < len(whole)
    assert "What the figures mean" not in without
    assert "Workload and settings" in without
    tight = step_summary(comparison, STEP_SUMMARY_BYTES - 600)
    assert len(tight.encode()) <= 600
    assert tight.startswith("# FAIL")
    assert "Cut here" in tight
    assert step_summary(comparison, STEP_SUMMARY_BYTES) == ""


def test_github_files_are_appended_to(comparison: Comparison, run: Run, tmp_path: Path) -> None:
    page, outputs = tmp_path / "summary.md", tmp_path / "output"
    page.write_text("earlier\n", encoding="utf-8")
    names = {"GITHUB_STEP_SUMMARY": str(page), "GITHUB_OUTPUT": str(outputs)}
    github.write(comparison, Path("results/x"), names)
    assert page.read_text(encoding="utf-8") == "earlier\n" + comparison_report(comparison)
    found = dict(line.split("=", 1) for line in outputs.read_text(encoding="utf-8").splitlines())
    assert found["verdict"] == "FAIL"
    assert found["exit_code"] == "3"
    assert found["failed"] == "int8,rtn_int4+prompt_lookup,int8_naive"
    assert found["rtn_int4_prompt_lookup-kld_mean"] == "FAIL"
    assert found["results"] == "results/x"
    github.write(run, None, names)
    assert outputs.read_text(encoding="utf-8").count("verdict=") == 1


def test_github_summary_counts_what_the_file_holds(comparison: Comparison, tmp_path: Path) -> None:
    page = tmp_path / "summary.md"
    page.write_text("x" * (STEP_SUMMARY_BYTES - 700), encoding="utf-8")
    github.write(comparison, None, {"GITHUB_STEP_SUMMARY": str(page)})
    assert STEP_SUMMARY_BYTES - 700 < page.stat().st_size <= STEP_SUMMARY_BYTES


def test_github_without_a_workflow_writes_nothing(comparison: Comparison, tmp_path: Path) -> None:
    github.write(comparison, None, {})
    assert not list(tmp_path.iterdir())


class Page(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset({"meta", "br", "line", "circle", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


def test_html_is_whole_and_fetches_nothing(comparison: Comparison, golden: Any) -> None:
    text = comparison_html(comparison)
    golden("comparison.html", text)
    page = parsed(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(key in attributes for _, attributes in page.tags for key in ("src", "href", "onload"))
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_html_escapes_what_results_hold(comparison: Comparison) -> None:
    evil = "<script>alert(1)</script>"
    arm = comparison.arms[0].model_copy(update={"label": evil})
    text = comparison_html(
        comparison.model_copy(update={"arms": (arm, *comparison.arms[1:]), "baseline": evil, "warnings": (evil,)})
    )
    assert evil not in text
    parsed(text)


def test_html_of_a_bare_comparison(comparison: Comparison) -> None:
    bare = comparison.model_copy(update={"judgements": {}, "self_test": (), "warnings": (), "environment": {}, "workload": {}})
    parsed(comparison_html(bare))


def test_plots_stand_where_the_numbers_say(comparison: Comparison) -> None:
    drawn = dict(forest.plots(comparison))
    assert list(drawn) == ["tpot_s.p50", "ttft_s.p50", "kld.mean", "mc.accuracy"]
    page = parsed(drawn["tpot_s.p50"])
    x = {
        attributes["class"]: float(attributes["x1"] or 0)
        for tag, attributes in page.tags
        if tag == "line" and "class" in attributes
    }
    estimates = [float(attributes["cx"] or 0) for _, attributes in page.tags if attributes.get("class") == "estimate"]
    dots = [attributes for _, attributes in page.tags if attributes.get("class") == "dot"]
    assert len(dots) == 4 * comparison.pairs
    assert max(estimates) < x["neutral"] < x["threshold"]
    assert sorted(estimates) == [estimates[i] for i in (3, 1, 2, 0)]


def test_plot_of_a_figure_whose_good_side_is_the_right(comparison: Comparison) -> None:
    page = parsed(dict(forest.plots(comparison))["mc.accuracy"])
    lines = {
        attributes["class"]: float(attributes["x1"] or 0)
        for tag, attributes in page.tags
        if tag == "line" and "class" in attributes
    }
    assert lines["threshold"] < lines["neutral"]


@pytest.mark.parametrize("spread", [0.0, 1e-9])
def test_plot_of_a_single_point(comparison: Comparison, spread: float) -> None:
    judged = comparison.judgements["int8"][0].model_copy(
        update={"effect": 1.0, "low": 1.0 - spread, "high": 1.0 + spread, "tau": 0.0}
    )
    parsed(forest.plot("tpot_s.p50", [forest.Bar("x", judged)]))


# --- README ----------------------------------------------------------------------------------------------------------

EMPTY = """# infopt

<!-- results:begin -->
old
<!-- results:end -->

between

<!-- techniques:begin --><!-- techniques:end -->
end
"""


def test_readme_tables_replace_only_what_is_between_the_markers(comparison: Comparison, golden: Any) -> None:
    row = readme.TechniqueRow(
        "nf4", "4-bit NormalFloat | per block", "load", "bitsandbytes", "[QLoRA](https://arxiv.org/abs/2305.14314)",
        "infopt/techniques/nf4.py", "recipes/nf4.yaml",
    )  # fmt: skip
    made = readme.with_techniques(readme.with_results(EMPTY, {"results/examples/demo": comparison}), [row])
    golden("readme.md", made)
    assert "old" not in made
    assert made.startswith("# infopt\n\n<!-- results:begin -->\n")
    assert "<!-- results:end -->\n\nbetween\n\n<!-- techniques:begin -->" in made
    assert made.endswith("<!-- techniques:end -->\nend\n")
    again = readme.with_techniques(readme.with_results(made, {"results/examples/demo": comparison}), [row])
    assert again == made


@pytest.mark.parametrize(
    "text",
    ["", "<!-- results:begin -->", "<!-- results:end --><!-- results:begin -->", EMPTY + EMPTY],
    ids=["none", "one", "turned", "twice"],
)
def test_readme_needs_its_markers(comparison: Comparison, text: str) -> None:
    with pytest.raises(InputError, match="results:begin"):
        readme.with_results(text, {"x": comparison})


def test_readme_examples_come_from_the_results_folder(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no comparison"):
        readme.read_examples(tmp_path)
    folder = tmp_path / "results" / "examples" / "demo"
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(dump(comparison), encoding="utf-8")
    assert readme.read_examples(tmp_path) == {"results/examples/demo": comparison}


def test_readme_names_what_failed_and_why_an_arm_has_nothing(comparison: Comparison) -> None:
    dead = comparison.arms[1].model_copy(update={"figures": {}, "error": "out of memory"})
    found = {label: each for label, each in comparison.judgements.items() if label != "int8"}
    text = readme.with_results(
        EMPTY,
        {"x": comparison.model_copy(update={"arms": (comparison.arms[0], dead, *comparison.arms[2:]), "judgements": found})},
    )
    assert "| out of memory |" in text
    assert "**FAIL** (kld.mean)" in text


# --- Sentences -------------------------------------------------------------------------------------------------------


def test_machine_names_the_accelerator_first() -> None:
    gpu = {"device": "NVIDIA H200", "cpu": "Xeon", "cores": 16, "threads": 8, "memory_bytes": 10**11}
    assert summary.machine(gpu) == "NVIDIA H200, Xeon, 16 cores, 8 threads, 100 GB"
    assert summary.machine({"device": "cpu", "cpu": "Xeon"}) == "Xeon"
    assert summary.machine({"device": "cpu"}) == "cpu"
    assert summary.machine({}) == "a machine that was not described"


def test_workload_without_a_fixed_shape() -> None:
    assert summary.workload({"name": "chat.jsonl", "batch": 4}) == "chat.jsonl, batch 4"
    assert summary.workload({"prompt_tokens": 8, "new_tokens": 2}) == "8 prompt tokens + 2 new tokens, batch 1"


def test_different_references_are_all_named(comparison: Comparison) -> None:
    first, second = (each.arm for each in comparison.arms[:2])
    other = second.model_copy(update={"reference": "as stored"})
    assert summary.references([first, second]) == (f"reference: {first.reference}",)
    assert summary.references([first, other]) == (f"baseline: {first.reference}", "int8: as stored")


def test_settings_read_as_text() -> None:
    lists = {"gpus": [{"name": "a"}, {"name": "b"}], "texts": ["x", "y"], "empty": []}
    nested = {**lists, "on": True, "share": 0.123456, "a": {"peak_bytes": 2_000_000}}
    found = {path: summary.plain(path, value) for path, value in summary.flatten(nested)}
    assert found == {
        "gpus.0.name": "a", "gpus.1.name": "b", "texts": "x, y", "empty": "–", "on": "yes", "share": "0.1235",
        "a.peak_bytes": "2.00 MB",
    }  # fmt: skip
    assert summary.plain("x", None) == "–"
    assert summary.plain("x", False) == "no"
