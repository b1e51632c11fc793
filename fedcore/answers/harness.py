"""Tasks of lm-eval, on a model in memory and from a folder of YAML files, without a network."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Any

from fedcore.checks import count, is_number
from fedcore.errors import FedcoreError, missing_extra

PREFIX = "lm-eval:"
"""What the names of lm-eval's tasks begin with here."""

_SEED = 0


@dataclass(frozen=True)
class HarnessTask:
    """One of lm-eval's tasks.

    Attributes:
        name: with :data:`PREFIX`.
        folder: where its YAML file is; None for those that lm-eval comes with.
        limit: only so many of its documents; all where it is None.
    """

    name: str
    folder: Path | None = None
    limit: int | None = None

    def first(self, limit: int | None) -> HarnessTask:
        """The task with its first ``limit`` documents; with all where it is None."""
        return self if limit is None else replace(self, limit=count("", "limit", limit, least=1))

    def check(self) -> None:
        """Refuse what cannot be run, before a model is loaded.

        Raises:
            FedcoreError: the folder does not exist.
            MissingExtraError: lm-eval is not installed.
        """
        if find_spec("lm_eval") is None:
            raise missing_extra("lm-eval", "answers")
        if self.folder is not None and not self.folder.is_dir():
            raise FedcoreError(
                f"{self.name}: there is no folder {self.folder}; pass --task-folder with the "
                "folder of its YAML file"
            )

    def rows(self, model: Any, tokenizer: Any, batch_size: int) -> dict[str, tuple[float, ...]]:
        """Measure to one value per document, for the measures that are means over documents.

        Prompts are as the task's file says, without examples in front. lm-eval prints while it
        works and asks git for a commit; what it prints is dropped.

        Raises:
            FedcoreError: lm-eval knows no such task, its data cannot be read, or none of its
                measures is a mean over documents.
        """
        self.check()
        import transformers

        level, logger = transformers.logging.get_verbosity(), logging.getLogger("lm_eval")
        before = logger.level
        logger.setLevel(logging.CRITICAL)
        transformers.logging.set_verbosity_error()
        try:
            with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
                result = self._evaluate(model, tokenizer, batch_size)
        except FedcoreError:
            raise
        # Tasks are other people's YAML, templates and data; what fails in them is of any kind.
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise FedcoreError(
                f"{self.name}: lm-eval cannot run it ({type(error).__name__}: {reason:.200})"
            ) from error
        finally:
            logger.setLevel(before)
            transformers.logging.set_verbosity(level)
        return self._by_document(result)

    def _evaluate(self, model: Any, tokenizer: Any, batch_size: int) -> Mapping[str, Any]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        name = self.name.removeprefix(PREFIX)
        described = self.folder is not None
        # With the tasks that it comes with, it reads thousands of files first.
        manager = TaskManager(
            include_path=str(self.folder) if described else None, include_defaults=not described
        )
        if name not in manager.all_tasks:
            where = f"in {self.folder}" if described else "among those that lm-eval comes with"
            raise FedcoreError(f"{self.name}: there is no such task {where}; pass --task-folder")
        result: Mapping[str, Any] = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[name],
            task_manager=manager,
            num_fewshot=0,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=_SEED,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
        return result

    def _by_document(self, result: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
        """The values of the samples, where their mean is what lm-eval reports."""
        measures: dict[str, list[float]] = defaultdict(list)
        # A group has several tasks; its documents are those of all of them.
        for task, samples in sorted(result["samples"].items()):
            reported = result["results"][task]
            for sample in sorted(samples, key=lambda one: one["doc_id"]):
                for measure in sample["metrics"]:
                    key = f"{measure},{sample['filter']}"
                    if key in reported and is_number(sample[measure]):
                        measures[key.removesuffix(",none")].append(float(sample[measure]))
        means = {
            measure: tuple(values)
            for measure, values in measures.items()
            if len(result["samples"]) > 1 or self._is_mean(result["results"], measure, values)
        }
        if not means:
            raise FedcoreError(
                f"{self.name}: none of its measures is a mean over documents, which is what "
                "errors and differences are computed from"
            )
        return means

    @staticmethod
    def _is_mean(results: Mapping[str, Any], measure: str, values: list[float]) -> bool:
        key = measure if "," in measure else f"{measure},none"
        (reported,) = results.values()
        return isclose(fmean(values), reported[key], abs_tol=1e-9)
