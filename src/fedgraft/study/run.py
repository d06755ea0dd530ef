"""One run of a study: what its stages share, and the stages that every kind of study is made of.

    extract     instruct - base
    pretrain    a model reads on
    graft       a model + scale * residual
    score       a model on held-out documents, dialogues and questions

A study of lineages has the same stages (`Stages`) for models of its own. Each finished stage is
kept, see `study.stage`.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgraft.evaluation.knowledge import Question
from fedgraft.evaluation.scorecard import Scorecard, evaluate, together
from fedgraft.models import open_model, open_tokenizer
from fedgraft.provenance import Record, derive_seed, hash_json
from fedgraft.study.cost import ADAPTERS, TRAINING, StageCost, graft_flops
from fedgraft.study.material import Material, hash_documents
from fedgraft.study.stage import Say, model_hash, run_stage
from fedgraft.study.study import Form, Merging, Study
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue
from fedgraft.text.packing import Rows, pack
from fedgraft.training.pretrain import continue_pretraining
from fedgraft.training.processes import run_together
from fedgraft.training.settings import PretrainSettings
from fedgraft.weights.compression import compress
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import Residual, extract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORECARD = "scorecard.json"
PLAINLY = Merging()


class Stages:
    """What stages have cost so far, and the stages themselves, whatever model they are about."""

    def __init__(self, out: Path, say: Say, num_processes: int = 1) -> None:
        self.out, self.say, self.num_processes = out, say, num_processes
        self.hashes: dict[Path, str] = {}
        """Of checkpoints that no stage made, see `study.stage.model_hash`."""
        self.costs: list[StageCost] = []
        self.losses: dict[str, tuple[tuple[int, float], ...]] = {}
        self.learning_rates: dict[str, tuple[tuple[int, float], ...]] = {}

    def train(
        self,
        model: Path,
        rows: Callable[[], Rows],
        settings: PretrainSettings,
        place: Path,
        *,
        text: str,
        row_length: int,
        seed: int,
        replay: Callable[[], Rows] | None = None,
        replay_share: float = 0.0,
        stage: str,
        title: str,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
    ) -> Path:
        """Train a model on rows, which are packed when they are needed; where it then stands.

        Several processes share the rows of each step, and where all parameters are trained those
        too, with gradients and optimizer state (FSDP2).

        Args:
            settings: Their seed is derived from the study's.
            place: Of the stage, below the output of the study.
            text: Hash of what the rows are made of.
            stage: Name of the stage among costs and losses.
            tokenizer: Goes with the model in place of its own, with a chat template.
        """
        settings = settings.model_copy(update={"seed": derive_seed(seed, "pretrain")})

        def make(folder: Path) -> dict[str, Any]:
            reads_on = partial(
                continue_pretraining,
                model,
                rows(),
                folder / "model",
                settings,
                replay=replay() if replay else None,
                replay_share=replay_share if replay else 0.0,
                overwrite=True,
                label=stage,
                sharded=self.num_processes > 1 and settings.lora is None,
            )
            if self.num_processes > 1:
                run_together(self.num_processes, reads_on)
            else:
                reads_on()
            if tokenizer:
                tokenizer.save_pretrained(folder / "model")
            record = Record.read(folder / "model")
            assert record
            return record.figures

        record = run_stage(
            self.out / place,
            title=title,
            inputs={"model": self.hash_of(model), "text": text},
            settings={
                **settings.model_dump(mode="json"),
                "replay": replay_share,
                "row_length": row_length,
            },
            make=make,
            say=self.say,
            keep="model-*",
        )
        self.cost(stage, record, trained=True, work=TRAINING)
        return self.out / place / "model"

    def compress(self, residual: Residual, form: Form, place: Path) -> Residual:
        """Store a residual in another form."""

        def make(folder: Path) -> None:
            compress(
                residual,
                folder / "residual",
                form.name,
                rank=form.rank,
                density=form.density,
            )

        record = run_stage(
            self.out / place,
            title=f"compress {place.name}",
            inputs={"residual": residual.content_hash},
            settings=form.model_dump(),
            make=make,
            say=self.say,
        )
        self.cost(place.as_posix(), record)
        return Residual.open(self.out / place / "residual")

    def evaluate(
        self,
        arm: str,
        seed: int | None,
        model: Path | Callable[[Path], Path],
        place: Path,
        *,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        tokenizer: "PreTrainedTokenizerBase",
        window: int,
        max_new_tokens: int,
        documents: Mapping[str, Sequence[Document]],
        dialogues: Sequence[Dialogue] = (),
        questions: Sequence[Question] = (),
        responses: Sequence[Dialogue] = (),
        benchmarks: Callable[[Path], Scorecard] | None = None,
        title: str,
    ) -> Scorecard:
        """Score a model.

        Args:
            model: Where it stands; or what makes it in the folder of the stage, for as long as the
                scoring takes.
            inputs: What the model is, by hash.
            benchmarks: Scores the model that stands there on more.
        """

        def make(folder: Path) -> None:
            scored = model if isinstance(model, Path) else model(folder)
            card = evaluate(
                open_model(scored),
                tokenizer,
                arm=arm,
                seed=seed,
                documents=documents,
                dialogues=dialogues,
                questions=questions,
                responses=responses,
                window=window,
                max_new_tokens=max_new_tokens,
            )
            if benchmarks:
                card = together(card, benchmarks(scored))
            if scored != model:
                shutil.rmtree(scored)
            (folder / SCORECARD).write_text(card.model_dump_json(indent=1), encoding="utf-8")

        asked = [one.model_dump() for one in (*dialogues, *questions, *responses)]
        record = run_stage(
            self.out / place,
            title=title,
            inputs={
                **inputs,
                "documents": hash_documents(*documents.values()),
                "asked": hash_json(asked),
            },
            settings={**settings, "texts": list(documents)},
            make=make,
            say=self.say,
        )
        self.cost(place.as_posix(), record)
        return Scorecard.model_validate_json((self.out / place / SCORECARD).read_bytes())

    def hash_of(self, model: Path) -> str:
        """Hash of what made a model; its figures hold times, which differ from run to run."""
        if model in self.hashes:
            return self.hashes[model]
        record = Record.read(model)
        assert record
        return hash_json(record.model_dump(exclude={"figures"}))

    def cost(
        self, stage: str, record: Record, *, trained: bool = False, work: str = ADAPTERS
    ) -> None:
        figures = record.figures
        self.costs.append(
            StageCost(
                stage=stage,
                work=work if figures.get("num_tokens") else "",
                seconds=figures["seconds"],
                num_tokens=figures.get("num_tokens", 0),
                flops=figures.get("flops", 0.0),
            )
        )
        if trained:
            self.losses[stage] = tuple((int(s), float(loss)) for s, loss in figures["losses"])
            self.learning_rates[stage] = tuple(
                (int(s), float(rate)) for s, rate in figures.get("learning_rates", ())
            )


class Run(Stages):
    """The family, the tokenizer and the material of a study."""

    def __init__(self, study: Study, out: Path, say: Say, num_processes: int = 1) -> None:
        super().__init__(out, say, num_processes)
        self.study = study
        self.family = Family.open(study.family.base, study.family.instruct)
        self.base, self.instruct = self.family.base.path, self.family.instruct.path
        self.parents = {
            "base": self.family.base.content_hash,
            "instruct": self.family.instruct.content_hash,
        }
        base, instruct = self.family.base, self.family.instruct
        self.hashes = {one.path: model_hash(one, instruct) for one in (base, instruct)}
        self.forms: dict[Form, Residual] = {}
        self.tokenizer = open_tokenizer(self.instruct)
        self.material = Material.load(study)

    def extract(self) -> None:
        def make(folder: Path) -> None:
            extract(self.family, folder / "residual")

        record = run_stage(
            self.out / "residual",
            title="extract the residual",
            inputs=self.parents,
            settings={},
            make=make,
            say=self.say,
        )
        self.cost("extract", record)
        self.residual = Residual.open(self.out / "residual" / "residual")

    def pretrain(
        self,
        model: Path,
        documents: Sequence[Document],
        settings: PretrainSettings,
        place: Path,
        *,
        seed: int,
        replay_share: float,
        stage: str,
        title: str,
    ) -> Path:
        """Let a model read documents; returns where it then stands.

        Args:
            settings: Their seed is derived from the study's.
            place: Of the stage, below the output of the study.
            replay_share: Share of the study's old text.
            stage: Name of the stage among costs and losses.
        """
        replay = self.material.replay if replay_share else ()
        return self.train(
            model,
            lambda: self.rows(documents, seed),
            settings,
            place,
            text=hash_documents(documents, replay),
            row_length=self.study.row_length,
            seed=seed,
            replay=(lambda: self.rows(replay, seed)) if replay else None,
            replay_share=replay_share,
            stage=stage,
            title=title,
        )

    def add(self, model: Path, scale: float, place: Path, merging: Merging = PLAINLY) -> Path:
        """Write model + scale * residual to `place`."""
        return graft(
            model,
            self._in_form(merging.form),
            place,
            scale=scale,
            method=merging.method,
            factors=merging.factors,
        )

    def _graft_in(self, model: Path, scale: float, folder: Path) -> Path:
        return self.add(model, scale, folder / "graft")

    def _in_form(self, form: Form | None) -> Residual:
        if form is None:
            return self.residual
        if form not in self.forms:
            self.forms[form] = self.compress(self.residual, form, Path("residuals", form.words))
        return self.forms[form]

    def graft(
        self,
        model: Path,
        scale: float,
        place: Path,
        *,
        stage: str,
        title: str,
        merging: Merging = PLAINLY,
    ) -> Path:
        """Add the residual to a model; returns where the graft stands."""

        def make(folder: Path) -> dict[str, Any]:
            self.add(model, scale, folder / "model", merging)
            return {"flops": graft_flops(self.family.num_parameters)}

        record = run_stage(
            self.out / place,
            title=title,
            inputs={"model": self.hash_of(model), "residual": self.residual.content_hash},
            settings={"scale": scale, **merging.model_dump()},
            make=make,
            say=self.say,
        )
        self.cost(stage, record)
        return self.out / place / "model"

    def grafted(self, seed: int) -> Path:
        """Pre-train the base and graft the instructions on; returns where the graft stands."""
        study, (scale,) = self.study, self.study.scale.grid
        newer = self.pretrain(
            self.base,
            self.material.new,
            study.pretrain,
            Path(f"seed-{seed}", "pretrained_base"),
            seed=seed,
            replay_share=study.replay.share if study.replay else 0.0,
            stage=f"pretrained_base, seed {seed}",
            title=f"seed {seed}: pre-train the base",
        )
        return self.graft(
            newer,
            scale,
            Path(f"seed-{seed}", "graft"),
            stage=f"graft, seed {seed}",
            title=f"seed {seed}: graft at scale {scale:g}",
        )

    def score(
        self,
        arm: str,
        seed: int | None,
        model: Path,
        place: Path,
        *,
        documents: Mapping[str, Sequence[Document]],
        dialogues: Sequence[Dialogue],
        questions: Sequence[Question],
        title: str,
        scale: float | None = None,
    ) -> Scorecard:
        """Score a model, or with a scale its graft, which stands for as long as that takes."""
        inputs = {"model": self.hash_of(model)}
        scored: Path | Callable[[Path], Path] = model
        if scale is not None:
            inputs["residual"] = self.residual.content_hash
            scored = partial(self._graft_in, model, scale)
        return self.evaluate(
            arm,
            seed,
            scored,
            place,
            inputs=inputs,
            settings={**self.study.evaluation.model_dump(), "scale": scale},
            tokenizer=self.tokenizer,
            window=self.study.evaluation.window,
            max_new_tokens=self.study.evaluation.max_new_tokens,
            documents=documents,
            dialogues=dialogues,
            questions=questions,
            title=title,
        )

    def residual_facts(self) -> dict[str, Any]:
        figures = self.residual.record.figures
        return {
            "num_parameters": self.family.num_parameters,
            "relative_norm": self.residual.relative_norm,
            **{name: value for name, value in figures.items() if isinstance(value, int | float)},
        }

    def inputs(self) -> dict[str, str]:
        """Role -> content hash, for the result."""
        return {
            **self.parents,
            "training text": self.material.training_hash,
            "test material": self.material.test_hash,
        }

    def rows(self, documents: Sequence[Document], seed: int) -> Rows:
        """Documents, packed for the family; the seed says in which order."""
        return pack(
            self.tokenizer,
            documents,
            self.study.row_length,
            seed=seed,
            num_positions=self.family.base.config.get("max_position_embeddings"),
        )


def versions() -> dict[str, str]:
    """fedgraft and the libraries, for the result."""
    record = Record.make("stage")
    return {"fedgraft": record.fedgraft, **record.libraries}
