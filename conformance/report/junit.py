"""The report as JUnit XML, which CI servers read: one test suite for each chapter, and one for the profiles."""

import xml.etree.ElementTree as ET
from typing import Any

from conformance.report.summary import FAILED, chapters, error_text, failed_claim, reproduce, text

__all__ = ["junit"]


def junit(data: dict[str, Any]) -> str:
    """Render the document. It has a failure or an error whenever the run does not conform, so that CI cannot go green.

    A public operation that is unsupported in a profile of the run is a failure; an internal one is skipped.
    """
    root = ET.Element("testsuites", name="conformance")
    for name, group in chapters(data).items():
        suite = ET.SubElement(root, "testsuite", name=f"conformance.{text(name)}")
        _properties(suite, data)
        for entry in group:
            _case(suite, data, entry)
        _count(suite)
    _profiles(ET.SubElement(root, "testsuite", name="conformance.profiles"), data)
    _count(root)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _properties(suite: ET.Element, data: dict[str, Any]) -> None:
    properties = ET.SubElement(suite, "properties")
    values = {"adapter": data["adapter"]["name"], "version": data["adapter"]["version"]}
    values |= {name: data[name] for name in ("dtype", "seed", "spec", "vectors")}
    for name, value in values.items():
        ET.SubElement(properties, "property", name=name, value=text(value))


def _case(suite: ET.Element, data: dict[str, Any], entry: dict[str, Any]) -> None:
    chapter, _, name = str(entry["id"]).partition("/")
    case = ET.SubElement(suite, "testcase", classname=f"conformance.{text(chapter)}", name=text(name))
    case.set("time", f"{entry['seconds']:.4f}")
    if entry["verdict"] == "pass":
        return
    if entry["verdict"] == "unsupported":
        kind = "failure" if failed_claim(data, entry) else "skipped"
    else:
        kind = {"fail": "failure", "error": "error"}[entry["verdict"]]
    problem = ET.SubElement(case, kind, message=text(entry["detail"]))
    if kind != "skipped":  # which has no type in JUnit's form
        problem.set("type", entry["verdict"])
        problem.text = "\n".join(_lines(data, entry))


def _lines(data: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    lines = [text(entry["detail"]), text(error_text(entry)), f"requirements: {text(' '.join(entry['requirements']))}"]
    if entry["verdict"] in FAILED:
        lines.append(f"likely: {text(entry['meaning'])}")
    if entry["blocked_by"] is not None:
        lines.append(f"mend {text(entry['blocked_by'])} first")
    return [line for line in lines if line] + [f"reproduce: {text(reproduce(data, entry))}"]


def _profiles(suite: ET.Element, data: dict[str, Any]) -> None:
    """Add one test for each profile: a case of the manifest that was not run at all shows here alone."""
    for name, profile in data["profiles"].items():
        case = ET.SubElement(suite, "testcase", classname="conformance.profiles", name=text(name), time="0")
        if not profile["conforms"]:
            message = f"{profile['passed']} of {profile['expected']} passed, {profile['failed']} failed"
            ET.SubElement(case, "failure", message=message, type="profile")
    _count(suite)


def _count(element: ET.Element) -> None:
    """Set the totals of a suite, or of all suites."""
    cases = list(element.iter("testcase"))
    element.set("tests", str(len(cases)))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(name, str(sum(case.find(tag) is not None for case in cases)))
    element.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.4f}")
