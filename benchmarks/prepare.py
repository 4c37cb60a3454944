"""Seconds and memory of `prepare` by the number of processes, beside another checkout; kills.

python -m benchmarks.prepare [--megabytes=200] [--rounds=3] [--baseline=../checkout]

The text is JSON lines in eight zst files, one of which has half of it: the standard library of the
running Python and of its packages, again and again, each time with another number in it. Every
round runs one process, two, and `prepare` of the baseline, one after the other. Then the job of two
processes is killed at half and at nine tenths of its pieces and run again.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import zstandard

from stem_jax.data.corpora import read_corpus
from stem_jax.data.sentencepiece_training import train_sentencepiece

ROOT = Path(__file__).parent.parent
_POLL_SECONDS = 0.05


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200.0, help="of text, unpacked")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8000, help="of the SentencePiece model")
    parser.add_argument("--baseline", type=Path, help="a checkout to compare with")
    parser.add_argument("--folder", help="for the text; without it, a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(_measure(args, Path(folder)), indent=2))


def _measure(args: argparse.Namespace, folder: Path) -> dict:
    model = folder / "model"
    num_bytes = _write_text(folder, args.megabytes * 1e6)
    train_sentencepiece(read_corpus("pydoc"), model, args.vocab_size)
    flags = [f"--input={folder}/*.jsonl.zst", f"--tokenizer-path={model}", "--json"]
    cases = {"one": (ROOT, ["--processes=1"]), "two": (ROOT, ["--processes=2"])}
    if args.baseline:
        cases["baseline"] = (args.baseline.resolve(), [])
    rounds: dict[str, list[float]] = {name: [] for name in cases}
    memory, checksums, pieces = dict.fromkeys(cases, 0), set(), 0
    for number in range(args.rounds):
        for name, (root, own) in cases.items():
            out = folder / f"{name}-{number}"
            run = _Run(root, [*flags, *own, f"--out={out}"])
            summary = run.wait()
            rounds[name].append(run.seconds)
            memory[name] = max(memory[name], run.peak_bytes)
            checksums.add(_checksums(out))
            pieces = summary.get("pieces") or pieces
    ratio = _median_ratio(rounds["two"], rounds["one"])
    result = {
        "text_mb": round(num_bytes / 1e6, 1),
        "pieces": pieces,
        "seconds": {name: [round(s, 1) for s in found] for name, found in rounds.items()},
        "two_over_one": round(ratio, 3),
        "peak_mib_of_all_processes": {name: peak >> 20 for name, peak in memory.items()},
    }
    if args.baseline:
        over = _median_ratio(rounds["two"], rounds["baseline"])
        result["two_over_baseline"] = round(over, 3)
    for share in (0.5, 0.9):
        out = folder / f"killed-{share}"
        result[f"killed_at_{share}"] = _killed(flags, out, int(share * pieces))
        checksums.add(_checksums(out))
    result["equal_checksums"] = len(checksums) == 1
    return result | {
        "rounds": args.rounds,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }


def _median_ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _write_text(folder: Path, num_bytes: float) -> int:
    """Eight files, the first with half of the text; returns its bytes."""
    shares = [0.5] + [0.5 / 7] * 7
    documents, total = _documents(), 0
    for index, share in enumerate(shares):
        size = 0
        path = folder / f"{index}.jsonl.zst"
        with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
            while size < share * num_bytes:
                text = next(documents)
                size += len(text.encode())
                packed.write(json.dumps({"id": index, "text": text}).encode() + b"\n")
        total += size
    return total


def _documents() -> Iterator[str]:
    """Endless; none comes twice."""
    texts = list(read_corpus("stdlib"))
    number = 0
    while True:
        for text in texts:
            number += 1
            yield f"Copy {number}\n{text}"


def _checksums(out: Path) -> tuple[str, ...]:
    splits = ("train", "validation")
    return tuple(json.loads((out / s / "meta.json").read_text())["checksum"] for s in splits)


class _Run:
    """A `prepare` under way, and the memory of all its processes together."""

    def __init__(self, root: Path, flags: list[str]):
        self.seconds, self.peak_bytes = 0.0, 0
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stem_jax.prepare", *flags],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def wait(self) -> dict:
        """Its summary, when it is done."""
        text, _ = self._process.communicate()
        self.seconds = time.perf_counter() - self._began
        self._watcher.join()
        if self._process.returncode:
            raise RuntimeError(f"prepare ended with status {self._process.returncode}")
        return json.loads(text)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        self._watcher.join()

    def _watch(self) -> None:
        while self._process.poll() is None:
            try:
                own = psutil.Process(self._process.pid)
                family = [own, *own.children(recursive=True)]
                # Pages that processes share are counted once.
                total = sum(process.memory_full_info().pss for process in family)
            except psutil.Error:
                # One has ended meanwhile.
                continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(_POLL_SECONDS)


def _killed(flags: list[str], out: Path, pieces: int) -> dict:
    """Kills a job when so many pieces are done, and runs it again."""
    flags = [*flags, "--processes=2", f"--out={out}"]
    run = _Run(ROOT, flags)
    while _done(out) < pieces:
        time.sleep(_POLL_SECONDS)
    run.kill()
    done = _done(out)
    summary = _Run(ROOT, flags).wait()
    return {
        "done_before": done,
        "resumed": summary["resumed_pieces"],
        "pieces": summary["pieces"],
    }


def _done(out: Path) -> int:
    """Pieces in the stores or kept as files."""
    work = out / ".prepare"
    try:
        recorded = json.loads((work / "progress.json").read_text())["pieces"]
    except FileNotFoundError:
        recorded = 0
    names = list((work / "pieces").iterdir()) if (work / "pieces").exists() else []
    return recorded + sum(int(path.stem) >= recorded for path in names)


if __name__ == "__main__":
    main()
