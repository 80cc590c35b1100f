"""`titans-video doctor`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

import titans_video
from titans_video.cli.run import announce_imports
from titans_video.config.help import About
from titans_video.config.parse import parse


@dataclass(frozen=True)
class DoctorFlags:
    """The output."""

    json: bool = False
    """Print one JSON object instead of a table."""


DOCTOR = About(
    DoctorFlags,
    "Check this installation and machine, and print how to repair what is missing.",
    (("Check everything", ""), ("For a program or a bug report", "--json")),
    notes="The exit code is 1 if something is wrong. What is only optional does not count.",
)
MARKS = {"ok": "ok", "optional": "-", "problem": "WRONG"}


def main(argv: Sequence[str], prog: str = "titans-video doctor") -> int:
    """Print the findings; return 1 if one is a problem, else 0."""
    flags = parse(DoctorFlags(), argv, prog=prog, about=DOCTOR)
    announce_imports("the other packages")
    from titans_video.reporting.doctor import examine

    findings = examine()
    problems = sum(finding.state == "problem" for finding in findings)
    if flags.json:
        found = {"version": titans_video.__version__, "ok": not problems, "findings": list(map(asdict, findings))}
        print(json.dumps(found, indent=1))
        return int(problems > 0)
    width = max(len(finding.name) for finding in findings)
    for group, members in groupby(findings, key=lambda finding: finding.group):
        print(group)
        for finding in members:
            print(f"  {MARKS[finding.state]:<5}  {finding.name:<{width}}  {finding.value}")
            if finding.fix:
                print(f"  {'':<5}  {'':<{width}}  fix: {finding.fix}")
    print(f"{problems} problem{'s' * (problems > 1)}, see WRONG." if problems else "No problem was found.")
    return int(problems > 0)
