"""Folders of tasks: which of them are run, and mistakes in them named."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from lm_eval.models.dummy import DummyLM

from stem_jax.errors import InputError
from stem_jax.evaluation import tasks
from stem_jax.evaluation.tasks import run_tasks

TASKS = Path(__file__).parents[1] / "data" / "lm_eval_tasks"


def _local_task(folder, name, **changes):
    """A folder with the task of choices, under this name and with other lines in its YAML."""
    folder.mkdir(exist_ok=True)
    shutil.copy(TASKS / "facts_choice.jsonl", folder)
    lines = (TASKS / "facts_choice.yaml").read_text().splitlines()
    for key, value in {"task": name, **changes}.items():
        lines = [f"{key}: {value}" if line.startswith(f"{key}:") else line for line in lines]
    (folder / f"{name}.yaml").write_text("\n".join(lines))
    return str(folder)


class _Asked(Exception):
    """The tasks were loaded."""


def _loaded_names(*given):
    """Names of the tasks that would be run."""
    names = []

    def on_loaded(loaded):
        names.extend(task.config.task for task in loaded)
        raise _Asked

    with pytest.raises(_Asked):
        run_tasks(None, given, on_loaded=on_loaded)
    return names


def test_a_task_that_is_there_twice_runs_once_or_is_refused(tmp_path):
    one, other = (_local_task(tmp_path / name, "same") for name in ("one", "other"))
    assert _loaded_names(one, f"{one}/") == ["same"]
    with pytest.raises(
        InputError, match=f"--tasks={one} and --tasks={other} both have the task 's"
    ):
        run_tasks(None, [one, other])


def test_a_group_and_one_of_its_members_are_refused():
    def task(name):
        return SimpleNamespace(config=SimpleNamespace(task=name))

    group = SimpleNamespace(get_all_tasks=lambda: [task("a"), task("b")])
    loaded = {"groups": {"g": group}, "tasks": {"a": task("a")}}
    kinds = {"g": "GROUP", "a": "TASK"}
    manager = SimpleNamespace(
        load=lambda specs: loaded,
        task_index={
            name: SimpleNamespace(kind=SimpleNamespace(name=kinds[name])) for name in kinds
        },
    )
    with pytest.raises(InputError, match="--tasks=g and --tasks=a both have the task 'a'"):
        tasks._load(manager, [tasks._Wanted(name, name, name) for name in kinds])


@pytest.mark.parametrize(
    ("changes", "last_line", "why"),
    [
        ({"doc_to_text": '"{{nokey.y}}"'}, "", "UndefinedError: 'nokey' is undefined"),
        ({}, "{broken\n", "JSON parse error.* in row 24"),
        ({"output_type": "nonsense"}, "", "invalid output_type 'nonsense'"),
    ],
)
def test_mistakes_in_local_tasks_are_named(tmp_path, changes, last_line, why):
    folder = _local_task(tmp_path, "wrong", **changes)
    with open(tmp_path / "facts_choice.jsonl", "a") as data:
        data.write(last_line)
    with pytest.raises(
        InputError, match=rf"task 'wrong' of --tasks={folder} cannot be used.*{why}"
    ):
        run_tasks(None, [folder])


def test_a_template_that_fails_in_a_later_document(tmp_path):
    second = json.loads((TASKS / "facts_choice.jsonl").read_text().splitlines()[1])["prompt"]
    template = f"\"{{{{prompt if prompt != '{second}' else nokey.y}}}}\""
    folder = _local_task(tmp_path, "wrong", doc_to_text=template)
    with pytest.raises(
        InputError, match=r"a template of --tasks=.* cannot be filled in.*'nokey' is"
    ):
        run_tasks(DummyLM(), [folder], limit=2)
