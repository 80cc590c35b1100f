"""Print which files and functions of the package run in one optimizer step, and which turn a prompt into a video.

Both walks call `titans_video.cli.main.main(argv)` in this process, on the mock clips and a tiny SoraDiT.

What is counted:

- A file counts when any function of it is called. Module and class bodies, and calls made while a module is imported,
  do not count.
- A function counts once, under its qualified name. Lambdas, comprehensions and generator expressions do not count as
  functions, but they do make their file count.
- Step: everything between the call of `STEP` and its return, in the middle of a run with AdamW, the identity codec, the
  builtin text encoder, no EMA, no save and no validation. Calls into `LOADER` and all calls below them (reading,
  decoding, collating) are excluded. Logging after `STEP` returns is reported on a line of its own.
- Prompt: everything from `main()` to the finished mp4, with classifier-free guidance. The files in `DISPATCH` select
  the command and report errors; they run and are listed, but the total does not include them.

`--check` exits with 1 when a total exceeds its target.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "titans_video"
MANIFEST = REPOSITORY / "train" / "videos" / "mock_data" / "manifest.jsonl"

STEP = ("training/trainer.py", "_optimizer_step")
"""File and name of the function that performs one optimizer step. Update it when the function moves."""
LOADER = "data/loader.py"
"""File whose calls, and everything below them, count as data loading."""
DISPATCH = ("cli/main.py", "cli/run.py")
"""Files that run before a command's own function."""
STEPS, MEASURED = 5, 3
"""Optimizer steps of the run, and which of them is measured, counted from 1."""
STEP_TARGET, PROMPT_TARGET = 14, 26
"""Most files that `--check` accepts."""

TRAIN = (
    "train --preset tiny --model-dim 24 --depth 1 --heads 2 --vae-backend identity --text-model builtin "
    f"--height 16 --width 24 --num-frames 4 --batch-size 2 --max-steps {STEPS} --save-every 1000"
)
GENERATE = "generate --steps 2 --guidance-scale 3"
PROMPT = "a red circle moving right"

FUNCTION = 0x1
"""`CO_OPTIMIZED`: set for functions, lambdas and comprehensions, not for module and class bodies."""


@dataclass
class Walk:
    """Files and functions that ran.

    Attributes:
        title: what was measured.
        target: most files allowed.
        calls: functions of each file, both in order of first call.
        uncounted: files that are listed but not part of the total.
        notes: further figures.
    """

    title: str
    target: int
    calls: dict[str, list[str]] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def add(self, file: str, code: CodeType) -> None:
        functions = self.calls.setdefault(file, [])
        if not code.co_name.startswith("<") and code.co_qualname not in functions:
            functions.append(code.co_qualname)

    @property
    def counted(self) -> dict[str, list[str]]:
        return {file: names for file, names in self.calls.items() if file not in self.uncounted}

    @property
    def files(self) -> int:
        return len(self.counted)

    @property
    def functions(self) -> int:
        return sum(map(len, self.counted.values()))


class Tracer:
    """Report every call of a package function, in every thread, unless it runs below an excluded call.

    Args:
        on_call: called with the file (relative to the package) and the code of each call that is not excluded.
        on_return: the same for its return.
        excluded: whether a call, and everything below it, is left out.
    """

    def __init__(
        self,
        on_call: Callable[[str, CodeType], None],
        on_return: Callable[[str, CodeType], None],
        excluded: Callable[[str], bool] = lambda file: False,
    ) -> None:
        self.on_call, self.on_return, self.excluded = on_call, on_return, excluded
        self.files: dict[str, str] = {}
        self.local = threading.local()

    def _file(self, code: CodeType) -> str:
        name = code.co_filename
        if name not in self.files:
            path = Path(name)
            self.files[name] = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
        return self.files[name]

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not (file := self._file(code)):
            return
        stack: list[bool] = self.local.__dict__.setdefault("stack", [])
        if event == "call":
            hidden = (bool(stack) and stack[-1]) or not code.co_flags & FUNCTION or self.excluded(file)
            stack.append(hidden)
            if not hidden:
                self.on_call(file, code)
        elif stack and not stack.pop():
            self.on_return(file, code)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def run(argv: list[str], tracer: Tracer) -> None:
    """Run a command in this process under `tracer`; its output is shown only when it fails."""
    from titans_video.cli.main import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), tracer.active():
        code = main(argv)
    if code:
        raise SystemExit(f"walk: `titans-video {' '.join(argv)}` ended with exit code {code}.\n{output.getvalue()}")


def walk_step(folder: Path) -> Walk:
    """Train for `STEPS` steps into `folder` and record step `MEASURED`."""
    walk = Walk(f"One optimizer step (step {MEASURED} of {STEPS}), data loading excluded", STEP_TARGET)
    after: dict[str, None] = {}
    seen = {"steps": 0, "inside": False, "loads": 0}

    def on_call(file: str, code: CodeType) -> None:
        if (file, code.co_name) == STEP:
            seen["steps"] += 1
            seen["inside"] = True
        if seen["steps"] == MEASURED:
            if seen["inside"]:
                walk.add(file, code)
            else:
                after[file] = None

    def on_return(file: str, code: CodeType) -> None:
        if (file, code.co_name) == STEP:
            seen["inside"] = False

    def excluded(file: str) -> bool:
        if file == LOADER:
            seen["loads"] += 1
        return file == LOADER

    argv = [*TRAIN.split(), "--manifest", str(MANIFEST), "--output-dir", str(folder)]
    run(argv, Tracer(on_call, on_return, excluded))
    if seen["steps"] != STEPS:
        raise SystemExit(f"walk: {STEP[0]}:{STEP[1]} ran {seen['steps']} times, not {STEPS}. Update STEP.")
    if not seen["loads"]:
        raise SystemExit(f"walk: the run never calls {LOADER}. Update LOADER.")
    more = [file for file in after if file not in walk.calls]
    if more:
        walk.notes.append(f"Until the next step begins, {len(more)} more files: {', '.join(more)}.")
    return walk


def walk_prompt(folder: Path) -> Walk:
    """Generate a video from the checkpoint in `folder` and record everything from `main()` on."""
    walk = Walk("A prompt becomes a video, from main() to the file", PROMPT_TARGET, uncounted=DISPATCH)
    out = folder / "video.mp4"
    argv = [*GENERATE.split(), "--checkpoint", str(folder / "last.pt"), "--prompt", PROMPT, "--out", str(out)]
    run(argv, Tracer(walk.add, lambda file, code: None))
    if not out.is_file():
        raise SystemExit(f"walk: the command did not write {out}.")
    dispatch = [file for file in DISPATCH if file in walk.calls]
    functions = sum(map(len, walk.calls.values()))
    walk.notes.append(f"With {' and '.join(dispatch)}: {len(walk.calls)} files, {functions} functions.")
    return walk


def as_text(walk: Walk, markdown: bool) -> str:
    """Format a walk: totals, then each file with its functions."""
    comparison = "within" if walk.files <= walk.target else "above"
    total = f"{walk.files} files, {walk.functions} functions ({comparison} the target of {walk.target} files)."
    lines = [f"## {walk.title}" if markdown else walk.title, "", total, *walk.notes, ""]
    for number, (file, functions) in enumerate(walk.calls.items(), start=1):
        mark = " (not counted)" if file in walk.uncounted else ""
        if markdown:
            names = ", ".join(f"`{name}`" for name in functions)
            lines.append(f"{number}. `{file}`{mark}: {names}" if names else f"{number}. `{file}`{mark}")
        else:
            lines += [f"{number:3} {file}{mark}", *(f"        {name}" for name in functions)]
    return "\n".join(lines) + "\n"


def as_json(walk: Walk) -> dict[str, Any]:
    return {
        "files": walk.files,
        "functions": walk.functions,
        "target": walk.target,
        "uncounted": [file for file in walk.uncounted if file in walk.calls],
        "calls": walk.calls,
        "notes": walk.notes,
    }


def main() -> int:
    """Measure both walks and print them; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a total exceeds its target")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write both walks as JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    args = parser.parse_args()
    sys.path[:0] = [str(PACKAGE.parent), str(REPOSITORY)]
    with tempfile.TemporaryDirectory() as folder:
        walks = {"step": walk_step(Path(folder)), "prompt": walk_prompt(Path(folder))}
    for walk in walks.values():
        print(as_text(walk, args.markdown))
    if args.json:
        args.json.write_text(json.dumps({name: as_json(walk) for name, walk in walks.items()}, indent=2) + "\n")
    return int(args.check and any(walk.files > walk.target for walk in walks.values()))


if __name__ == "__main__":
    sys.exit(main())
