"""fedgraft: graft instructions onto fresh knowledge.

    residual = instruct - base                              one family, tensor by tensor
    grafted  = further_pretrained(base) + scale * residual  instructions on fresh knowledge

Names are loaded when they are first used, so that `import fedgraft` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgraft.errors import FedgraftError as FedgraftError
    from fedgraft.evaluation.closeness import choose_scale as choose_scale
    from fedgraft.evaluation.gate import decide as decide
    from fedgraft.evaluation.scorecard import Scorecard as Scorecard
    from fedgraft.evaluation.scorecard import evaluate as evaluate
    from fedgraft.models import open_model as open_model
    from fedgraft.models import open_tokenizer as open_tokenizer
    from fedgraft.report.page import write_report as write_report
    from fedgraft.study.arms import run as run
    from fedgraft.study.result import Result as Result
    from fedgraft.study.study import Study as Study
    from fedgraft.text.corpus import Corpus as Corpus
    from fedgraft.text.dialogues import Dialogue as Dialogue
    from fedgraft.text.dialogues import load_dialogues as load_dialogues
    from fedgraft.text.dialogues import pack_dialogues as pack_dialogues
    from fedgraft.text.packing import pack as pack
    from fedgraft.training.adapter import merge_adapter as merge_adapter
    from fedgraft.training.adapter import open_adapted as open_adapted
    from fedgraft.training.adapter import train_adapter as train_adapter
    from fedgraft.training.pretrain import continue_pretraining as continue_pretraining
    from fedgraft.training.settings import AdapterSettings as AdapterSettings
    from fedgraft.training.settings import PretrainSettings as PretrainSettings
    from fedgraft.training.settings import TrainingSettings as TrainingSettings
    from fedgraft.weights.adapted import Adapted as Adapted
    from fedgraft.weights.checkpoint import Checkpoint as Checkpoint
    from fedgraft.weights.compression import compress as compress
    from fedgraft.weights.family import Family as Family
    from fedgraft.weights.graft import graft as graft
    from fedgraft.weights.inspection import inspect as inspect
    from fedgraft.weights.live import Live as Live
    from fedgraft.weights.live import applied as applied
    from fedgraft.weights.merging import Factors as Factors
    from fedgraft.weights.merging import Method as Method
    from fedgraft.weights.residual import Residual as Residual
    from fedgraft.weights.residual import extract as extract
    from fedgraft.weights.residual import verify as verify

_HOME = {
    "Adapted": "fedgraft.weights.adapted",
    "AdapterSettings": "fedgraft.training.settings",
    "Checkpoint": "fedgraft.weights.checkpoint",
    "Corpus": "fedgraft.text.corpus",
    "Dialogue": "fedgraft.text.dialogues",
    "Factors": "fedgraft.weights.merging",
    "Family": "fedgraft.weights.family",
    "FedgraftError": "fedgraft.errors",
    "Live": "fedgraft.weights.live",
    "Method": "fedgraft.weights.merging",
    "Residual": "fedgraft.weights.residual",
    "Result": "fedgraft.study.result",
    "Scorecard": "fedgraft.evaluation.scorecard",
    "Study": "fedgraft.study.study",
    "PretrainSettings": "fedgraft.training.settings",
    "TrainingSettings": "fedgraft.training.settings",
    "applied": "fedgraft.weights.live",
    "choose_scale": "fedgraft.evaluation.closeness",
    "compress": "fedgraft.weights.compression",
    "continue_pretraining": "fedgraft.training.pretrain",
    "decide": "fedgraft.evaluation.gate",
    "evaluate": "fedgraft.evaluation.scorecard",
    "extract": "fedgraft.weights.residual",
    "graft": "fedgraft.weights.graft",
    "inspect": "fedgraft.weights.inspection",
    "load_dialogues": "fedgraft.text.dialogues",
    "merge_adapter": "fedgraft.training.adapter",
    "open_adapted": "fedgraft.training.adapter",
    "open_model": "fedgraft.models",
    "open_tokenizer": "fedgraft.models",
    "pack": "fedgraft.text.packing",
    "pack_dialogues": "fedgraft.text.dialogues",
    "run": "fedgraft.study.arms",
    "train_adapter": "fedgraft.training.adapter",
    "verify": "fedgraft.weights.residual",
    "write_report": "fedgraft.report.page",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedgraft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
