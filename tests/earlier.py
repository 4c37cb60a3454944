"""What an earlier version made, kept in tests/data/earlier (its README says how), and its commands.

Runs stand at checkpoint STEP of END steps; `expected.json` holds what the version that made them
computed from there on.
"""

import json
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The version that made them.
COMMIT = "2657e48"
FOLDER = ROOT / "tests" / "data" / "earlier"
STEP, END = 240, 246
# The run `sentencepiece` once more, as it stood twenty steps before its end.
TWENTY_BEFORE, STEP_BEFORE = "twenty_before", 226
# As the commands of the runs name it, from the root of the repository.
SHOWN = "tests/data/earlier"
_SIZES = {
    "model.vocab_size": 448,
    "model.embed_dim": 12,
    "model.num_layers": 3,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.ffn_dim": 20,
    "model.stem_layers": "0,2",
    "tables.pad_multiple": 32,
    "data.sources": f"{SHOWN}/text.jsonl",
    "data.validation_fraction": 0.2,
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup_steps": 4,
    "train.steps": END,
    "train.global_batch_size": 4,
    "train.seq_len": 48,
    "train.sample_tokens": 4,
    "eval.every": 123,
    "checkpoint.every": STEP,
}
_HF = {"data.tokenizer": "hf"}
RUNS = {
    "sentencepiece": {},
    "hf": _HF | {"data.tokenizer_path": f"{SHOWN}/tokenizer.json"},
    # </s> is a word of the vocabulary here, which that version took for the end of a document.
    "hf_words": _HF | {"data.tokenizer_path": f"{SHOWN}/tokenizer_with_words.json"},
    "bytes": {"data.tokenizer": "bytes"},
    "offloaded": {"tables.resident_rows": 224},
    "dense": {"model.stem_layers": "none"},
    "bfloat16": {"model.param_dtype": "bfloat16", "model.compute_dtype": "bfloat16"},
}
# Flags of `prepare` that give the stores whose checksums are kept. Unless flags say otherwise, only
# special tokens end a document since.
STORES = {
    "sentencepiece": ["--vocab-size=448"],
    "hf": ["--tokenizer=hf", f"--tokenizer-path={SHOWN}/tokenizer.json"],
    "hf_words": [
        "--tokenizer=hf",
        f"--tokenizer-path={SHOWN}/tokenizer_with_words.json",
        "--bos=<s>",
        "--eos=</s>",
    ],
    "bytes": ["--tokenizer=bytes"],
}
SPLIT = ["--validation-fraction=0.2", "--seed=3"]


def train_flags(name: str, workdir: Path, **overrides) -> list[str]:
    """The command that made a run, and continues it; keys of `overrides` are section__key."""
    values = _SIZES | RUNS[name] | {k.replace("__", "."): v for k, v in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *flags]


def unpack(name: str, folder: Path) -> Path:
    """Makes the work folder of a kept run below `folder`."""
    with tarfile.open(FOLDER / "runs" / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def expected() -> dict:
    """What was computed then; a dictionary for each run, and for stores, patch and export."""
    return json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
