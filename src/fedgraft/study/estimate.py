"""What training should take, said before it begins: a plan on the machine as it was measured."""

import json
from dataclasses import asdict
from pathlib import Path

from fedgraft.errors import StudyError
from fedgraft.study.cost import Estimate
from fedgraft.study.machine import Machine, this_machine
from fedgraft.study.plan import plan
from fedgraft.study.recipes import LineageStudy
from fedgraft.study.stage import Say, run_stage
from fedgraft.study.study import Study

FILE = "machine.json"


def estimate(
    study: Study | LineageStudy, out: Path, *, say: Say, num_processes: int = 1
) -> tuple[Estimate, ...]:
    """The estimates of a study's plan, by kind of work.

    The machine is measured once, as a stage of its own; a study that goes on later, or elsewhere,
    keeps the measure of then. Empty, which is said, where the study cannot be planned (a model of
    another build than `study.shape` knows).
    """

    def make(folder: Path) -> None:
        told = json.dumps(asdict(this_machine()), indent=1)
        (folder / FILE).write_text(told, encoding="utf-8")

    folder = out / "machine"
    run_stage(folder, title="measure the machine", inputs={}, settings={}, make=make, say=say)
    machine = Machine(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    try:
        return plan(study, machine, num_processes=num_processes).estimates
    except StudyError as error:
        say(f"    no estimate of the time: {error}")
        return ()
