"""JUnit XML, one test case per gate: FAIL is a failure; INCONCLUSIVE and NOT COMPARABLE are skipped, with the reason.

Ungated figures inform and are no test cases. An arm without a result, or a comparison cut off, is an error.
"""

from __future__ import annotations

from xml.etree import ElementTree

from infopt.comparison import ArmResult, Comparison
from infopt.judgement import Judgement, Verdict
from infopt.report.tables import effect_text, interval_text, word

Case = ElementTree.Element


def junit_xml(comparison: Comparison) -> str:
    """A `testsuites` document with one suite per candidate."""
    suites = [_suite(comparison, arm) for arm in comparison.candidates]
    broken = [arm for arm in comparison.arms if arm.label == comparison.baseline and arm.error]
    if broken or not comparison.is_complete:
        suites.append(_broken(comparison, broken))
    root = ElementTree.Element("testsuites", {"name": "infopt compare", **_totals(suites)})
    root.extend(suites)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(comparison: Comparison, arm: ArmResult) -> ElementTree.Element:
    judged = comparison.judgements.get(arm.label, ())
    cases = [_case(arm.label, each) for each in judged if each.gate is not None or each.verdict is Verdict.NOT_COMPARABLE]
    if arm.error:
        cases.append(_error(arm.label, "result", arm.error))
    return _filled(arm.label, comparison.created_utc, cases)


def _broken(comparison: Comparison, arms: list[ArmResult]) -> ElementTree.Element:
    cases = [_error(arm.label, "result", arm.error or "") for arm in arms]
    if not comparison.is_complete:
        cases.append(_error("comparison", "complete", comparison.incomplete_reason or "no reason recorded"))
    return _filled("comparison", comparison.created_utc, cases)


def _filled(name: str, created_utc: str, cases: list[Case]) -> ElementTree.Element:
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    # JUnit wants local ISO 8601 without a zone; ours is UTC throughout.
    described = {"name": _clean(name), "timestamp": created_utc.removesuffix("Z").removesuffix("+00:00")}
    suite = ElementTree.Element("testsuite", described | {key: str(count) for key, count in counts.items()})
    suite.extend(cases)
    return suite


def _totals(suites: list[ElementTree.Element]) -> dict[str, str]:
    return {key: str(sum(int(suite.get(key, "0")) for suite in suites)) for key in ("tests", "failures", "errors", "skipped")}


def _case(label: str, judged: Judgement) -> Case:
    name = f"{judged.figure} {judged.gate}" if judged.gate else judged.figure
    case = ElementTree.Element("testcase", {"classname": _clean(f"infopt.{label}"), "name": _clean(name)})
    text = _clean(_text(judged))
    if judged.verdict is Verdict.FAIL:
        ElementTree.SubElement(case, "failure", {"message": text, "type": "gate"})
    elif judged.verdict in (Verdict.PASS, Verdict.IMPROVED):
        ElementTree.SubElement(case, "system-out").text = text
    else:
        ElementTree.SubElement(case, "skipped", {"message": text})
    return case


def _text(judged: Judgement) -> str:
    """`FAIL: effect 1.058×, interval 1.039 to 1.077×; note`."""
    effect = [] if judged.effect is None else [f"effect {effect_text(judged, judged.effect)}"]
    interval = [] if judged.low is None else [f"interval {interval_text(judged)}"]
    parts = [part for part in (", ".join(effect + interval), judged.note) if part]
    return f"{word(judged.verdict)}: {'; '.join(parts)}" if parts else word(judged.verdict)


def _error(label: str, name: str, message: str) -> Case:
    case = ElementTree.Element("testcase", {"classname": _clean(f"infopt.{label}"), "name": name})
    ElementTree.SubElement(case, "error", {"message": _clean(message), "type": "run"})
    return case


def _clean(text: str) -> str:
    """XML 1.0 allows no control characters; a tool's error message may hold some."""
    return "".join(c for c in text if c in "\t\n\r" or (" " <= c <= "\ud7ff") or ("\ue000" <= c <= "\ufffd") or c >= "\U00010000")
