"""Study files of every kind: which kind a file is of, and who runs it.

kind           asked for by         runs in
arms           (nothing)            study.arms
forgetting     curve                study.forgetting
departments    federation.rules     study.departments
selection      arms                 study.selection
lineage        models               study.lineage, whose file is study.recipes
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from fedgraft.errors import StudyError
from fedgraft.study import arms, departments, forgetting, lineage, selection, selection_plan
from fedgraft.study import plan as plans
from fedgraft.study.machine import Machine
from fedgraft.study.plan import SHARE, Plan
from fedgraft.study.recipes import LineageStudy
from fedgraft.study.result import Departments, Forgetting, Lineages, Result, Selections
from fedgraft.study.selection import SelectionStudy
from fedgraft.study.stage import Say
from fedgraft.study.study import Study
from fedgraft.training import processes

AnyStudy = Study | SelectionStudy | LineageStudy


def load(file: str | Path, places: Mapping[str, Path], *, dry: bool = False) -> AnyStudy:
    """Read a study file of any kind. Raises StudyError with all faults at once."""
    keys = _keys(Path(file))
    if "models" in keys:
        return LineageStudy.load(file, places, dry=dry)
    if "arms" in keys:
        return SelectionStudy.load(file, places, dry=dry)
    return Study.load(file, places, dry=dry)


def run(
    study: AnyStudy, out: Path, *, say: Say = lambda _: None, num_processes: int = 1
) -> Result | Forgetting | Departments | Selections | Lineages:
    """Run a study of any kind; see the head of this file.

    Args:
        num_processes: Of this machine, one a device, which train each model together; everything
            else is done in this process. A script that asks for several must be safe to import
            (`if __name__ == "__main__":`).

    Raises StudyError where a launcher (`torchrun`) started several of this process.
    """
    if (started := processes.num_processes()) > 1:
        raise StudyError(
            f"expected a study to be started once, found it started {started} times by a launcher; "
            f"start it without one, with --processes {started}"
        )
    if isinstance(study, LineageStudy):
        return lineage.run(study, out, say=say, num_processes=num_processes)
    if isinstance(study, SelectionStudy):
        return selection.run(study, out, say=say, num_processes=num_processes)
    match study.kind:
        case "forgetting":
            return forgetting.run(study, out, say=say, num_processes=num_processes)
        case "departments":
            return departments.run(study, out, say=say, num_processes=num_processes)
        case "arms":
            return arms.run(study, out, say=say, num_processes=num_processes)


def plan(
    study: Study | LineageStudy | SelectionStudy,
    machine: Machine,
    *,
    num_processes: int = 1,
    share: float = SHARE,
) -> Plan:
    """Say what a study of any kind would take. Raises StudyError as `study.plan.plan` does."""
    if isinstance(study, SelectionStudy):
        return selection_plan.plan(study, machine, num_processes=num_processes, share=share)
    return plans.plan(study, machine, num_processes=num_processes, share=share)


def _keys(file: Path) -> set[str]:
    """The keys of a file; none where it is no mapping, which whoever reads it says."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    return set(content) if isinstance(content, dict) else set()
