"""Memory of a run from its last step to its exit, on a large store of random text.

python -m benchmarks.end_memory [--tokens=200000000] [--folder=DIR]

Writes a store with 2% held out, trains a tiny model for a few steps, and samples the anonymous
memory (RssAnon) of the process from the record of the last step on: validation, the save, both
baselines. Prints the figure at the step, the largest after it, and what the run says of its text;
exits with 1 where it grew by more than 256 MB.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.children import environment
from stem_jax.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
_HELD_OUT = 0.02
# Tokens of a document, its bos and eos included, and documents that are drawn at once.
_DOCUMENT = 4096
_AT_ONCE = 1024
_EDGES = 256, 257
_STEPS = 4
_MOST = 256e6
_FLAGS = f"""
--config=configs/tiny.py --config.data.tokenizer=bytes --config.model.vocab_size=258
--config.model.num_layers=2 --config.model.embed_dim=16 --config.model.num_heads=1
--config.model.num_kv_heads=1 --config.model.ffn_dim=16 --config.model.stem_layers=1
--config.train.seq_len=128 --config.train.global_batch_size=64 --config.train.steps={_STEPS}
--config.train.sample_prompt= --config.eval.every=0 --config.checkpoint.every=0
""".split()


def write_store(folder: Path, tokens: int) -> None:
    """Documents of random letters, in the format of `data/token_store.py`."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(folder / "tokenizer")
    for split, share in (("train", 1 - _HELD_OUT), ("validation", _HELD_OUT)):
        documents = int(tokens * share) // _DOCUMENT
        _write_split(folder / split, documents, tokenizer.vocab_size, tokenizer.fingerprint)


def _write_split(folder: Path, documents: int, vocab_size: int, fingerprint: str) -> None:
    folder.mkdir()
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as file:
        for first in range(0, documents, _AT_ONCE):
            size = (min(_AT_ONCE, documents - first), _DOCUMENT)
            ids = rng.integers(ord("a"), ord("z") + 1, size).astype("<u2")
            ids[:, 0], ids[:, -1] = _EDGES
            digest.update(ids.tobytes())
            file.write(ids.tobytes())
    starts = (np.arange(documents + 1) * _DOCUMENT).astype("<u8").tobytes()
    (folder / "documents.bin").write_bytes(starts)
    digest.update(starts)
    text_bytes = np.full(documents, _DOCUMENT - 2, "<u8")
    (folder / "bytes.bin").write_bytes(text_bytes.tobytes())
    meta = {"format_version": 1, "name": "random", "split": folder.name, "dtype": "uint16"}
    meta |= {"vocab_size": vocab_size, "fingerprint": fingerprint}
    meta |= {"num_tokens": documents * _DOCUMENT, "num_documents": documents}
    meta |= {"num_bytes": int(text_bytes.sum()), "checksum": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def anonymous_bytes(process: int) -> int:
    """0 for a process that has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def measure(store: Path, workdir: Path) -> tuple[int, int, str]:
    """Anonymous bytes at the last step, the most after it, and what the run printed."""
    command = [sys.executable, "-m", "stem_jax.train", *_FLAGS]
    command += [f"--config.data.sources={store}", f"--workdir={workdir}"]
    metrics, at_step, most = workdir / "metrics.jsonl", 0, 0
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        while process.poll() is None:
            now = anonymous_bytes(process.pid)
            at_step = at_step or (now if _last_step(metrics) else 0)
            most = max(most, now if at_step else 0)
            time.sleep(0.02)
        out = process.stdout.read()
    if process.returncode:
        sys.exit(process.returncode)
    return at_step, most, out


def _last_step(metrics: Path) -> bool:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return any(json.loads(line)["step"] == _STEPS for line in lines if line.endswith("}"))


def main() -> None:
    """Parses flags and measures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the store")
    parser.add_argument("--folder", help="for the store and the run; without it, a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_store(Path(folder) / "store", args.tokens)
        at_step, most, out = measure(Path(folder) / "store", Path(folder) / "run")
    print(*[line for line in out.splitlines() if "xz" in line or "unigram" in line], sep="\n")
    grown = most - at_step
    print(f"at the last step {at_step / 1e6:.0f} MB, at most {grown / 1e6:.0f} MB more to the exit")
    sys.exit(grown > _MOST)


if __name__ == "__main__":
    main()
