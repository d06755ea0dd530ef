"""Seconds and memory of extract, graft and merge beside other tools and beside the disk itself.

    .venv/bin/python benchmarks/weight_arithmetic.py            # Qwen2-0.5B's shapes, five rounds
    .venv/bin/python benchmarks/weight_arithmetic.py --only extract graft --rounds 3
    .venv/bin/python benchmarks/weight_arithmetic.py --peak 0.5b 8b
    .venv/bin/python benchmarks/weight_arithmetic.py --work /dev/shm/benchmark   # no disk behind it

Whole processes, start-up included, one after the other in turn, inputs in the page cache, nothing
left to write back from the process before. The floor of a comparison reads its inputs with `cat`
and writes as many bytes with `cp`. Other tools get a virtual environment of their own below
`runs/venvs`, made on the first run; checkpoints come from `synthetic.py`. Results are Markdown.

Peak memory is what the kernel counts as resident for a process and its workers, pages that they
share counted once, sampled every 20 milliseconds; of it, anonymous memory is without mapped files,
which are only cache.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FEDGRAFT = str(Path(sys.executable).parent / "fedgraft")
SHAPES = ("0.5b", "1.5b", "8b")
TOOLS = {"residuals": "residuals==0.3.2", "mergekit": "mergekit==0.1.5"}
TORCH = "torch==2.13.0"
"""Installed first, so that no tool draws in another build."""
SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
dtype, sign, first, second, out = getattr(torch, sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
models = [AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (first, second)]
with torch.no_grad():
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        b.add_(a, alpha=sign)
models[1].save_pretrained(out)
AutoTokenizer.from_pretrained(second).save_pretrained(out)
"""
"""The usual script at its best: in place, and an output layer that is tied counted once."""
RESIDUALS_EXTRACT = """
import sys, torch
from residuals import Residuals
dtype, base, instruct, out = getattr(torch, sys.argv[1]), *sys.argv[2:]
Residuals.from_models(base_model=base, instruct_model=instruct, dtype=dtype).save_pretrained(out)
"""
RESIDUALS_APPLY = """
import sys, torch
from residuals import Residuals
dtype, target, residual, out = getattr(torch, sys.argv[1]), *sys.argv[2:]
Residuals.apply_to_pretrained(model=target, residuals=residual, out_dir=out, dtype=dtype)
"""
BARE = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from fedgraft.weights import checkpoint, residual, writer
hashed = checkpoint.blake3
class Unhashed:
    def update(self, _): pass
    def digest(self): return bytes(32)
def bare(data=None): return Unhashed() if data is None else hashed(data)
checkpoint.blake3 = writer.blake3 = bare
residual.Residual.refuse_damage = lambda _: None
from fedgraft.cli.main import app
sys.argv = ["fedgraft", *sys.argv[1:]]
app(prog_name="fedgraft")
"""
"""The command line without the hashes of numbers."""
MERGEKIT = """\
merge_method: {method}
base_model: {base}
dtype: bfloat16
models:
  - model: {first}
    parameters: {{weight: 1.0{parameters}}}
  - model: {second}
    parameters: {{weight: 1.0{parameters}}}
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A command that does the work; `{out}` in it stands for a directory to write."""

    name: str
    command: Sequence[str | Path]
    slow: bool = False
    """One round is enough."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ways to one result. The first one is fedgraft's, which the others are compared with."""

    title: str
    reads: Sequence[Path]
    """Directories whose weights are read."""
    writes: Sequence[Path]
    """Directories with as many bytes of weights as are written."""
    ways: Sequence[Way]


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    busy: float
    """Seconds of processors."""
    resident: float
    """Megabytes at the peak, of code and mapped files too."""
    anonymous: float
    written: float
    """Megabytes of weights."""


@dataclass(frozen=True, slots=True)
class Material:
    """The checkpoints of one shape, and a directory for what is made of them."""

    folder: Path
    work: Path

    @property
    def family(self) -> tuple[Path, Path]:
        return self.folder / "base", self.folder / "instruct"

    @property
    def out(self) -> Path:
        """What is measured writes here."""
        return self.work / "out"

    @property
    def newer(self) -> Path:
        return self.folder / "newer"

    def residual(self, form: str, tuned: str = "instruct") -> Path:
        """Return a stored residual, made on first use."""
        out = self.work / f"residual-{tuned}-{form}"
        return _once(out, _extract(self.folder / "base", self.folder / tuned, form))


def extract(material: Material) -> Comparison:
    family = material.family
    return Comparison(
        "Extract: base, instruct -> residual in bfloat16",
        family,
        family[:1],
        [
            *(
                Way(f"fedgraft, {form}", _extract(*family, form))
                for form in ("bfloat16", "auto", "packed")
            ),
            Way("fedgraft, bfloat16, no hashes", _bare(_extract(*family, "bfloat16"))),
            *_extract_elsewhere(family, "bfloat16"),
        ],
    )


def extract_wide(material: Material) -> Comparison:
    family = material.family
    return Comparison(
        "Extract: base, instruct -> residual in float32",
        family,
        family,
        [Way("fedgraft", _extract(*family, "float32")), *_extract_elsewhere(family, "float32")],
    )


def verify(material: Material) -> Comparison:
    residual = material.residual("bfloat16")
    return Comparison(
        "Verify: residual, base, instruct -> hashes, and which numbers are restored",
        [residual, *material.family],
        [],
        [Way("fedgraft", [FEDGRAFT, "residual", "verify", residual, *material.family])],
    )


def graft(material: Material) -> Comparison:
    newer, residual = material.newer, material.residual("bfloat16")
    theirs = _once(
        material.work / "residual-of-residuals",
        _script(RESIDUALS_EXTRACT, "bfloat16", *material.family, tool="residuals"),
    )
    return Comparison(
        "Graft: newer base, stored residual -> model in bfloat16",
        [newer, residual],
        [newer],
        [
            Way("fedgraft", _graft(newer, residual)),
            Way("fedgraft, no hashes", _bare([*_graft(newer, residual), "--any-parent"])),
            Way("fedgraft --verify", [*_graft(newer, residual), "--verify"]),
            *(
                Way(f"fedgraft, {form} residual", _graft(newer, material.residual(form)))
                for form in ("float32", "packed")
            ),
            Way(
                "transformers script",
                _script(SCRIPT, "bfloat16", "1", newer, _as_model(residual, material.work)),
            ),
            Way("residuals", _script(RESIDUALS_APPLY, "bfloat16", newer, theirs, tool="residuals")),
        ],
    )


def one_pass(material: Material) -> Comparison:
    newer, (base, instruct) = material.newer, material.family
    return Comparison(
        "Graft in one pass: newer base, base, instruct -> model in bfloat16",
        [newer, base, instruct],
        [newer],
        [
            Way("fedgraft", [*_graft(newer), "--base", base, "--instruct", instruct]),
            Way(
                "mergekit",
                _mergekit(material.work, "task_arithmetic", base, newer, instruct),
            ),
        ],
    )


def _merge(method: str, parameters: str) -> Callable[[Material], Comparison]:
    def comparison(material: Material) -> Comparison:
        base, instruct, second = (*material.family, material.folder / "second")
        residuals = [material.residual("bfloat16", tuned) for tuned in ("instruct", "second")]
        return Comparison(
            f"Merge: base, two instruct models -> model in bfloat16, {method}, density 0.5",
            [base, instruct, second],
            [base],
            [
                Way(
                    "fedgraft, two stored residuals",
                    [*_graft(base, *residuals), "--method", method, "--density", "0.5"],
                ),
                Way(
                    "mergekit",
                    _mergekit(material.work, method, base, instruct, second, parameters),
                    slow=True,
                ),
            ],
        )

    return comparison


COMPARISONS: dict[str, Callable[[Material], Comparison]] = {
    "extract": extract,
    "extract-float32": extract_wide,
    "verify": verify,
    "graft": graft,
    "one-pass": one_pass,
    "ties": _merge("ties", ", density: 0.5"),
    "dare_ties": _merge("dare_ties", ", density: 0.5"),
    "breadcrumbs": _merge("breadcrumbs", ", density: 0.5, gamma: 0.01"),
}


def compare(comparison: Comparison, rounds: int, out: Path) -> str:
    """Run every way in turn, `rounds` times, and return the table."""
    floor = Way("`cat` and `cp`", ["sh", "-c", _floor(comparison)])
    runs: dict[str, list[Run]] = {way.name: [] for way in (floor, *comparison.ways)}
    for turn in range(rounds):
        for way in (floor, *comparison.ways):
            if turn and way.slow:
                continue
            _warm(comparison.reads)
            runs[way.name].append(measure(way.command, out))
            print(f"{way.name}: {runs[way.name][-1]}", file=sys.stderr)
    bottom, ours = (runs[way.name] for way in (floor, comparison.ways[0]))
    rows = [
        f"### {comparison.title}",
        "",
        "| | seconds, median (lowest to highest) | of the floor | of fedgraft | processor seconds "
        "| peak MB resident (anonymous) | MB written |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in runs.items():
        seconds = [run.seconds for run in found]
        rows.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to "
            f"{max(seconds):.2f}) | {_ratio(found, bottom):.1f}x | {_ratio(found, ours):.1f}x "
            f"| {statistics.median(run.busy for run in found):.1f} "
            f"| {max(run.resident for run in found):.0f} "
            f"({max(run.anonymous for run in found):.0f}) | {found[0].written:,.0f} |"
        )
    return "\n".join(rows) + "\n"


def peaks(material: Material) -> dict[str, Run]:
    """Run each verb once; grafts are onto the base, which saves a checkpoint."""
    base, instruct = material.family
    ways = {
        "extract, bfloat16": _extract(base, instruct, "bfloat16"),
        "extract, packed": _extract(base, instruct, "packed"),
        "graft, packed residual": _graft(base, material.residual("packed")),
        "graft in one pass": [*_graft(base), "--base", base, "--instruct", instruct],
    }
    found = {name: measure(command, material.out) for name, command in ways.items()}
    shutil.rmtree(material.work)
    return found


def compare_peaks(runs: dict[str, dict[str, Run]]) -> str:
    """Return a table of the peaks by shape."""
    shapes = list(runs)
    rows = [
        f"| peak MB resident (anonymous), seconds | {' | '.join(shapes)} |",
        "|---|" + "---:|" * len(shapes),
    ]
    for name in runs[shapes[0]]:
        found = [runs[shape][name] for shape in shapes]
        cells = [f"{r.resident:.0f} ({r.anonymous:.0f}), {r.seconds:.1f} s" for r in found]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def measure(command: Sequence[str | Path], out: Path) -> Run:
    """Run a command to its end; what it wrote is counted and removed.

    This process stays small, because a child starts with its parent's peak.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(part).replace("{out}", str(out)) for part in command]
    log = out.with_name("log")
    os.sync()
    with log.open("wb") as stream:
        started = time.monotonic()
        child = subprocess.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT)
        resident, anonymous, ended = 0.0, 0.0, 0
        while not ended:
            time.sleep(0.02)
            whole, own = _memory(child.pid)
            resident, anonymous = max(resident, whole), max(anonymous, own)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        seconds = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(
            f"{' '.join(arguments[:4])} ... failed:\n{log.read_text(errors='replace')[-3000:]}"
        )
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    shutil.rmtree(out, ignore_errors=True)
    busy = usage.ru_utime + usage.ru_stime
    return Run(seconds, busy, resident, anonymous, written)


def _memory(process: int) -> tuple[float, float]:
    """Megabytes that a process and its workers hold now, all and anonymous; shared ones once."""
    whole = anonymous = 0.0
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for one in (process, *map(int, children)):
            kilobytes = dict(
                re.findall(r"(?m)^(Pss\w*):\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text())
            )
            whole += int(kilobytes.get("Pss", 0)) * 1.024e-3
            anonymous += int(kilobytes.get("Pss_Anon", 0)) * 1.024e-3
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # one has ended meanwhile
        return 0.0, 0.0
    return whole, anonymous


def _ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """Median over the rounds: the disk's speed changes from minute to minute."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(runs, others, strict=False))


def _extract_elsewhere(family: tuple[Path, Path], form: str) -> list[Way]:
    return [
        Way("transformers script", _script(SCRIPT, form, "-1", *family)),
        Way("residuals", _script(RESIDUALS_EXTRACT, form, *family, tool="residuals")),
    ]


def _floor(comparison: Comparison) -> str:
    reads = [str(file) for path in comparison.reads for file in _weights(path)]
    writes = [file for path in comparison.writes for file in _weights(path)]
    copies = [f"cp {file} {{out}}/{n}.safetensors" for n, file in enumerate(writes)]
    return " && ".join([f"cat {' '.join(reads)} > /dev/null", "mkdir {out}", *copies])


def _weights(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _warm(paths: Iterable[Path]) -> None:
    for path in paths:
        subprocess.run(["cat", *_weights(path)], stdout=subprocess.DEVNULL, check=True)


def _extract(base: Path, instruct: Path, form: str) -> list[str | Path]:
    return [FEDGRAFT, "residual", "extract", base, instruct, "--form", form, "--out", "{out}"]


def _bare(command: Sequence[str | Path]) -> list[str | Path]:
    return [sys.executable, "-c", BARE, *command[1:]]


def _graft(target: Path, *residual: Path) -> list[str | Path]:
    return [FEDGRAFT, "graft", target, *residual, "--out", "{out}"]


def _script(code: str, *arguments: str | Path, tool: str | None = None) -> list[str | Path]:
    python = _python(tool) if tool else Path(sys.executable)
    return [python, "-c", code, *arguments, "{out}"]


def _mergekit(
    work: Path, method: str, base: Path, first: Path, second: Path, parameters: str = ""
) -> list[str | Path]:
    config = work / f"{method}.yaml"
    text = MERGEKIT.format(
        method=method, base=base, first=first, second=second, parameters=parameters
    )
    config.write_text(text, encoding="utf-8")
    return [_python("mergekit").with_name("mergekit-yaml"), config, "{out}"]


def _as_model(residual: Path, work: Path) -> Path:
    """Give a residual's numbers the files of a model, for a script that loads them as one."""
    model = work / "residual-as-model"
    shutil.copytree(residual / "instruct", model, dirs_exist_ok=True)
    for file in _weights(residual):
        link = model / file.name.replace("residual", "model", 1)
        link.unlink(missing_ok=True)
        link.hardlink_to(file)
    return model


def _once(out: Path, command: Sequence[str | Path]) -> Path:
    """Run a command unless what it writes is there."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        arguments = [str(part).replace("{out}", str(out)) for part in command]
        subprocess.run(arguments, check=True, stdout=sys.stderr)
    return out


def _python(tool: str) -> Path:
    """Return the interpreter of a tool's own virtual environment, after making it."""
    venv = HERE.parent / "runs" / "venvs" / tool
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        for packages in ([TORCH], [TORCH, TOOLS[tool]]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (venv / "complete").touch()
    return python


def _material(shape: str, names: Sequence[str], runs: Path, place: Path) -> Material:
    """Return the checkpoints of a shape, made if need be, and an empty directory for the rest."""
    folder, work = runs / "synthetic" / shape, place / shape
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lacking = [name for name in names if not (folder / name).exists()]
    if lacking:
        make: list[str | Path] = [sys.executable, HERE / "synthetic.py", shape, folder, *lacking]
        subprocess.run(make, check=True, stdout=sys.stderr)
    return Material(folder, work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.5b", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(COMPARISONS), choices=COMPARISONS)
    parser.add_argument(
        "--peak", nargs="+", choices=SHAPES, metavar="SHAPE", help="compare peak memory instead"
    )
    runs = HERE.parent / "runs"
    parser.add_argument(
        "--work", type=Path, default=runs / "benchmark", help="directory that all ways write into"
    )
    given = parser.parse_args()
    if given.peak:
        found = {n: peaks(_material(n, ["base", "instruct"], runs, given.work)) for n in given.peak}
        print(compare_peaks(found))
        return
    material = _material(given.shape, ["base", "instruct", "second", "newer"], runs, given.work)
    for name in given.only:
        print(f"{name} ...", file=sys.stderr)
        print(compare(COMPARISONS[name](material), given.rounds, material.out), flush=True)
    shutil.rmtree(material.work)


if __name__ == "__main__":
    main()
