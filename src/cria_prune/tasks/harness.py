"""Tasks of the Language Model Evaluation Harness (lm-eval) on a model in memory.

lm-eval reads the task, asks the model and counts. This module hands it the model, keeps what it would leave
behind (modes, random states, settings of logging) off the caller, and says what went wrong in one line. Code
from a server is never run: not that of data sets, of models, or of the metrics that the library `evaluate`
fetches; nor is code that a model writes.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cria_prune.base.errors import ArtifactError, ConfigError, DataError, needed, said
from cria_prune.base.modules import copy_of, device_of, random_kept, shared_copy
from cria_prune.base.progress import quiet
from cria_prune.base.written import weights_kept
from cria_prune.tasks.loading import find_library

BOOTSTRAP = 1000
"""Draws for a standard error that has no formula (perplexity, F1)."""

NETWORK = ("httpx", "requests", "huggingface_hub")


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    folder: str | Path | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 8,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Return the metrics of some tasks of lm-eval by name, such as `arc_easy/acc` and `arc_easy/acc_stderr`.

    Prompts, examples in them and filters are lm-eval's; a filter other than none is named
    (`gsm8k/exact_match,strict-match`). The same call gives the same figures. What lm-eval prints goes to
    standard error.

    Args:
        model: a causal or sequence-to-sequence language model of transformers; it is left as it was.
        tokenizer: its tokenizer; it is left as it was.
        tasks: names of tasks, groups or tags.
        folder: a folder with tasks of your own, YAML as lm-eval reads it; they come before lm-eval's. It is
            code: it may name Python functions that lie in it, and they run. Paths in `data_files` are
            relative to the working directory.
        limit: examples per task, or a share of them if less than 1; all if None.
        batch_size: examples per batch, or "auto".
        device: run a copy there; where the model is if None.

    Raises:
        PackageError: lm-eval is not installed.
        ArtifactError: its `datasets` is so old that it runs code of data sets.
        ConfigError: there is no such task (near names are listed) or folder, the task would run code that
            a model writes or that is fetched, or the model writes no text.
        DataError: a data set cannot be fetched or read, or a task fails.
    """
    names = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    asked = f"Evaluating {', '.join(names) or 'nothing'} with lm-eval"
    _check_model(model, asked)
    elsewhere = device is not None and torch.device(device) != device_of(model)
    runner = copy_of(model).to(device) if elsewhere else shared_copy(model)
    with _left_alone(), weights_kept(runner):
        library = _find_harness(asked)
        manager = _manager(names, folder, asked)
        loaded = [item for name in names for item in _load(manager, name)]
        try:
            from lm_eval.models.huggingface import HFLM

            found = library.simple_evaluate(
                HFLM(pretrained=runner, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
                tasks=loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
                task_manager=manager, confirm_run_unsafe_code=False,
            )  # fmt: skip
        except Exception as error:  # whatever the task or the model raises
            raise DataError(
                asked, f"it stops with {said(error)}", "Mend the task, or try a smaller batch_size or limit"
            ) from error
    return {} if found is None else _flat(found["results"])


def _find_harness(asked: str) -> ModuleType:
    """Return the module lm_eval.

    Raises:
        PackageError: it is missing.
        ArtifactError: it would run fetched code.
    """
    with needed("eval", asked):
        import datasets
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ArtifactError(
            asked, f"datasets {datasets.__version__} can run code of data sets", "Install datasets 4 or later"
        )
    module: ModuleType = lm_eval
    return module


def _check_model(model: nn.Module, asked: str) -> None:
    known = isinstance(model, find_library(asked).PreTrainedModel)
    if not known or not model.can_generate():  # type: ignore[operator]
        raise ConfigError(
            asked, f"a {type(model).__name__} writes no text", "Pass a language model of transformers"
        )


def _manager(names: Sequence[str], folder: str | Path | None, asked: str) -> Any:
    """Return lm-eval's index of tasks; only that of the folder where it has all names, for it is quick."""
    from lm_eval.tasks import TaskManager

    if not names:
        raise ConfigError(asked, "no task is named", "Name at least one, such as arc_easy")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(asked, f"there is no folder {str(folder)!r}", "Give a folder with tasks in YAML")
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise ConfigError(
                asked,
                f"lm-eval knows no task {name!r}" + (f" in {str(folder)!r} or of its own" if folder else ""),
                f"Near names: {', '.join(near)}" if near else "`lm-eval ls tasks` lists all",
            )
    return manager


def _load(manager: Any, name: str) -> list[Any]:
    """Return the group of this name, else its tasks, with their data sets.

    Raises:
        ConfigError: it would run code that is fetched or that a model writes.
        DataError: a data set cannot be fetched or read, or the task is damaged.
    """
    asked = f"The task {name} of lm-eval"
    settings = manager.task_index[name].cfg or {}
    _check_safe([settings], asked)
    try:
        found = manager.load([name])
    except Exception as error:  # whatever the task or the library of its data raises
        chain = list(_chain(error))
        if any(isinstance(item, ImportError) and item.name == "evaluate" for item in chain):
            raise _fetched(asked) from error
        if any(_of_network(item) for item in chain):
            raise DataError(
                asked,
                f"its data set {settings.get('dataset_path', '')} cannot be fetched, {said(error)}",
                "Connect to the network once, or pass a `folder` with a task whose data_files are local",
            ) from error
        raise DataError(
            asked, f"it cannot be loaded, {said(error)}", "Check its YAML and its data"
        ) from error
    _check_safe([vars(task.config) for task in found["tasks"].values()], asked)
    group = found["groups"].get(name)
    return list(found["tasks"].values()) if group is None else [group]


def _check_safe(settings: Sequence[Mapping[str, Any]], asked: str) -> None:
    for item in settings:
        if item.get("unsafe_code"):
            raise ConfigError(asked, "it runs code that the model writes", "Use lm-eval itself, in a sandbox")
        metrics = item.get("metric_list") or ()
        if any(isinstance(metric, Mapping) and metric.get("hf_evaluate") for metric in metrics):
            raise _fetched(asked)


def _fetched(asked: str) -> ConfigError:
    return ConfigError(
        asked,
        "it takes a metric from the library evaluate, which runs code from a server",
        "Use lm-eval itself for this task, or a task with lm-eval's own metrics",
    )


def _flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return task/metric -> value, filters named unless none; counts and missing errors are left out."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, (int, float)):
                found[f"{task}/{metric}" if kind == "none" else f"{task}/{key}"] = float(value)
    return found


@contextmanager
def _left_alone() -> Iterator[None]:
    """Put random states, settings of logging and the environment back; print to standard error.

    Inside, `import evaluate` fails, and a bootstrap starts no processes: they would be forks of a process
    with threads.
    """
    loggers = [logging.getLogger(name) for name in (None, "lm_eval")]
    settings = [(item, item.level, item.handlers[:], item.propagate) for item in loggers]
    pools, blocked = os.environ.get("DISABLE_MULTIPROC"), sys.modules.get("evaluate", ...)
    with random_kept(), redirect_stdout(sys.stderr), quiet():
        try:
            loggers[1].setLevel(logging.ERROR)
            os.environ["DISABLE_MULTIPROC"] = "1"
            sys.modules["evaluate"] = None  # type: ignore[assignment]
            yield
        finally:
            _put_back(os.environ, "DISABLE_MULTIPROC", pools)
            _put_back(sys.modules, "evaluate", None if blocked is ... else blocked)
            for item, level, handlers, propagate in settings:
                item.setLevel(level)
                item.handlers[:], item.propagate = handlers, propagate


def _put_back(place: Any, key: str, value: Any) -> None:
    if value is None:
        place.pop(key, None)
    else:
        place[key] = value


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in NETWORK
