"""What a run left behind, to compare bit for bit: the arrays of a checkpoint, and its losses."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from stem_jax.checkpoints.checkpointer import Checkpointer
from stem_jax.config import MEMORY_SECTIONS, Config
from stem_jax.mesh import make_mesh
from stem_jax.training.blueprint import Blueprint
from stem_jax.training.state import abstract_state


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, whole, by its path in the state; on one device."""
    with Checkpointer(workdir, read_only=True) as checkpoints:
        config = _all_resident(checkpoints.info(step).config)
        mesh = make_mesh(config.mesh.on_one_device(), jax.devices()[:1])
        state = checkpoints.restore(step, abstract_state(Blueprint(config, mesh)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses(workdir: Path) -> dict[int, float]:
    """The training loss of each step that was logged; of one made again, the last."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def _all_resident(config: Config) -> Config:
    sections = {
        name: dataclasses.replace(getattr(config, name), resident_rows=None, host_rows=None)
        for name in ("tables", *MEMORY_SECTIONS)
    }
    return dataclasses.replace(config, **sections)
