"""Standard tasks of lm-evaluation-harness, by name or from a folder of task YAMLs."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.errors import InputError
from stem_jax.evaluation.limits import check_limit

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

VERSION = "0.4.13"
# What the papers call a task, where the harness has another name for it.
ALIASES = {"siqa": "social_iqa"}
_KEPT = """
    results groups group_subtasks versions n-shot n-samples configs higher_is_better samples
    """.split()


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What `TaskManager.load` takes for one name. source: the item of --tasks that asks for it."""

    source: str
    name: str
    spec: Any

    @property
    def local(self) -> bool:
        return self.spec != self.name


def evaluate_tasks(
    run: LoadedRun,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    max_gen_toks: int = 256,
    log_samples: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs tasks of the harness on a loaded run.

    Args:
        tasks: names of tasks, groups or tags of the harness, and folders with task YAMLs, of which
            all tasks are run. Data files that a local YAML names may lie beside it. What is named
            twice is run once.
        limit: examples of each task; None: all.
        num_fewshot: examples before each question; None: as the task has it.
        log_samples: keep every request and answer, under `samples`.
        batch_size, max_gen_toks, progress: see `harness.HarnessModel`.

    Returns:
        The harness's results, versions and task configurations, and `truncated`: requests whose
        beginning did not fit into the context.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, unreadable, there twice, cannot be
            downloaded or asks for what we have not.
    """
    _require_harness()
    from stem_jax.evaluation.harness import HarnessModel

    if max_gen_toks < 1:
        raise InputError(f"--max-gen-toks={max_gen_toks} must be at least 1")
    model = HarnessModel(run, batch_size, max_gen_toks, progress)
    options: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot}
    options["log_samples"] = log_samples
    results = run_tasks(model, tasks, **options, on_loaded=model.expect)
    return {**results, "truncated": model.truncated}


def run_tasks(
    model: "LM",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    log_samples: bool = False,
    on_loaded: Callable[[list["Task"]], None] | None = None,
) -> dict[str, Any]:
    """`evaluate_tasks` for any model of the harness, without `truncated`.

    on_loaded: called with all tasks before the first request is built.
    """
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate

    check_limit(limit, "examples")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"--num-fewshot={num_fewshot} must be at least 0")
    # Else some standard errors are bootstrapped in forked processes, beside JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    manager, wanted = _find(tasks)
    loaded = _load(manager, wanted)
    _check_fewshot(_members(loaded), num_fewshot or 0)
    if on_loaded is not None:
        on_loaded(_members(loaded))
    try:
        found = simple_evaluate(
            model=model,
            tasks=loaded,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=log_samples,
            task_manager=manager,
        )
    # Loading a task fills its templates in for the first document only.
    except TemplateError as error:
        raise InputError(
            f"a template of --tasks={','.join(tasks)} cannot be filled in ({_line(error)}); "
            "correct the task, or the document that lacks what it names"
        ) from error
    return {key: found[key] for key in _KEPT if key in found}


def format_results(results: dict[str, Any]) -> str:
    """The harness's table of tasks and, if there are any, of groups."""
    from lm_eval.utils import make_table

    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install lm-eval=={VERSION}"
        ) from error


def _find(tasks: Sequence[str]) -> tuple["TaskManager", list[_Wanted]]:
    """The index that knows all these tasks, and what it is to load."""
    from lm_eval.tasks import TaskManager

    folders = list({Path(task).resolve(): task for task in tasks if Path(task).is_dir()}.values())
    names = [ALIASES.get(task, task) for task in tasks if not Path(task).is_dir()]
    names = list(dict.fromkeys(names))
    wanted: list[_Wanted] = []
    for folder in folders:
        _check_yaml(Path(folder))
        # Without the harness's own tasks: reading their thousands of files takes many seconds.
        local = TaskManager(include_path=folder, include_defaults=False)
        if not local.all_subtasks:
            raise InputError(
                f"--tasks={folder} has no task YAML; give a folder with one file per task, which "
                "ends in .yaml and has a key `task`"
            )
        for name in local.all_subtasks:
            wanted.append(_Wanted(folder, name, _with_data_beside(local.task_index[name])))
    manager = TaskManager(include_path=folders, include_defaults=bool(names))
    for name in names:
        if name not in manager.task_index:
            raise InputError(
                f"--tasks={name} is neither a folder nor a task of lm-eval {VERSION}; "
                "`lm-eval ls tasks` lists those"
            )
    return manager, wanted + [_Wanted(name, name, name) for name in names]


def _check_yaml(folder: Path) -> None:
    """The harness leaves files that it cannot read out without a word."""
    import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

    for path in sorted(folder.glob("**/*.yaml")):
        try:
            yaml.compose(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(
                f"{path} is not YAML ({_line(error)}); correct or remove it"
            ) from error


def _with_data_beside(entry: Any) -> dict[str, Any]:
    """A local task, with the paths of data files that lie beside its YAML made absolute."""
    folder = entry.yaml_path.parent

    def beside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: beside(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [beside(inner) for inner in value]
        return str((folder / value).resolve()) if (folder / value).is_file() else value

    task: dict[str, Any] = {"task": entry.name}
    options = entry.cfg.get("dataset_kwargs") or {}
    if "data_files" in options:
        task["dataset_kwargs"] = {**options, "data_files": beside(options["data_files"])}
    # Only as a member of a group may a task differ from its file.
    return {"group": "local", "task": [task]}


def _load(manager: "TaskManager", wanted: Sequence[_Wanted]) -> list[Any]:
    """The tasks with their data. A group stays one: its score is an average over its tasks."""
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]  # it has none
    from jinja2 import TemplateError

    built: list[Any] = []
    sources: dict[str, str] = {}
    for one in wanted:
        try:
            loaded = manager.load([one.spec])
        # Downloads fail in many ways, and mistakes in a YAML too; these are the bases.
        except (
            *(OSError, ValueError, RuntimeError, LookupError, TypeError),
            *(DatasetsError, TemplateError),
        ) as error:
            raise _unusable(one, error) from error
        top = manager.task_index[one.name].kind.name == "GROUP"
        found = [loaded["groups"][one.name]] if top else list(loaded["tasks"].values())
        for name in (task.config.task for task in _members(found)):
            other = sources.setdefault(name, one.source)
            if other != one.source:
                raise InputError(
                    f"--tasks={other} and --tasks={one.source} both have the task {name!r}; leave "
                    "one of them out, or give the task of a folder another name"
                )
        built += found
    return built


def _unusable(one: _Wanted, error: Exception) -> InputError:
    from jinja2 import TemplateError

    # What data sets raise says only that they cannot be read; its cause says why.
    why = _line(error.__cause__ or error)
    if not isinstance(error, OSError) and (one.local or isinstance(error, TemplateError)):
        return InputError(
            f"task {one.name!r} of --tasks={one.source} cannot be used ({why}); correct its YAML "
            "or its data, or leave it out"
        )
    return InputError(
        f"--tasks={one.name}: its data cannot be had ({why}); data sets come from the "
        "Hugging Face Hub: without a network give a folder of task YAMLs with local files, "
        "set HF_HOME to a cache that has them, or HF_ENDPOINT to a mirror"
    )


def _members(loaded: list[Any]) -> list["Task"]:
    """The tasks themselves, those of groups among them."""
    return [
        task
        for item in loaded
        for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])
    ]


def _check_fewshot(loaded: list["Task"], num_fewshot: int) -> None:
    for task in loaded if num_fewshot else ():
        # From the questions themselves, the harness leaves out the one that is asked.
        asked = task.fewshot_cfg.split == task.config.test_split
        available = len(list(task.fewshot_docs() or ()))
        if num_fewshot + asked > available:
            raise InputError(
                f"--num-fewshot={num_fewshot} is too many for task {task.config.task!r}, which "
                f"has {available} examples; give fewer, or leave the task out"
            )


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
