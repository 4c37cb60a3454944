"""Made-up records of runs: small, and with whatever differences a test wants."""

import copy
from typing import Any

import numpy as np

SIZE = {
    "parameters": 1000,
    "active_parameters": 1000,
    "table_parameters": 0,
    "flops_per_token": 6000.0,
    "compiled_flops_per_token": 6100.0,
}


def record(variant: str = "dense", seed: int = 1, bits: float = 2.0, **given: Any) -> dict:
    """One run's record.

    Args:
        bits: per byte of the test text; dev has the same.
        given: text, tokens, rate, purpose; measures, size, documents, diverged, commit instead of
            what stands here.
    """
    run = {
        "study": "core",
        "variant": variant,
        "text": given.get("text", "prose"),
        "tokens": given.get("tokens", 4000),
        "rate": given.get("rate", 1.0),
        "seed": seed,
        "purpose": given.get("purpose", "main"),
    }
    name = f"{run['text']}.{variant}.n{run['tokens']}.r{run['rate']:g}.s{seed}"
    if run["purpose"] not in ("main", "rate", "length"):
        name = f"{name}.{run['purpose']}"
    measures = {"test_bits_per_byte": bits, "dev_bits_per_byte": bits, **given.get("measures", {})}
    return {
        "format": 1,
        "name": name,
        "run": run,
        "commit": given.get("commit", "c0ffee0" * 5),
        "machine": {"cpu": "a CPU", "threads": 1, "versions": {"jax": "0.10.2"}},
        "config": {"train": {"seq_len": 256, "global_batch_size": 16}},
        "checksums": {
            "text": f"text of {run['text']}",
            "tokenizer": "tokenizer",
            "test": f"test of {run['text']}",
            "params": f"{variant} {seed}",
        },
        "diverged": given.get("diverged"),
        "curve": {
            "tokens": [1000, 2000, run["tokens"]],
            "loss": [5.0, 4.0, 3.0],
            "dev_tokens": [2000, run["tokens"]],
            "dev_bits_per_byte": [bits + 0.5, bits],
        },
        "measures": measures,
        "documents": given.get("documents", {"nats": [10.0, 20.0], "bytes": [10, 10]}),
        "size": {**SIZE, **given.get("size", {})},
    }


def runs(variant: str, shift: float, seeds: int = 5, noise: float = 0.001, **given: Any) -> list:
    """Runs of one variant: bits per byte of dense's seeds, `shift` apart with some noise."""
    draw = np.random.RandomState(sum(map(ord, variant)))
    return [
        record(variant, seed, 2.0 + 0.01 * (seed % 3) + shift + noise * draw.randn(), **given)
        for seed in range(1, seeds + 1)
    ]


def study_records() -> list[dict]:
    """A small study of all purposes, without noise that would hide its differences."""
    found = []
    for variant, shift, gap in (
        ("dense", 0.0, 0.010),
        ("stem_half", -0.02, 0.015),
        ("value", -0.021, 0.010),
        ("gate", 0.03, 0.011),
    ):
        size = {} if variant == "dense" else {"active_parameters": 800, "parameters": 3000}
        main = runs(variant, shift, size=size)
        for one in main:
            one["measures"] |= {"spikes": 0.0, "memorization_gap": gap + 1e-4 * one["run"]["seed"]}
            for place in range(10):
                bits = one["measures"]["test_bits_per_byte"]
                one["measures"][f"input_frequency_{place}"] = bits + 0.1 * (10 - place)
                one["measures"][f"target_frequency_{place}"] = bits + 0.2 * (10 - place)
        found += main
        for rate, worse in ((1 / 3, 0.05), (1.0, 0.0), (3.0, 0.02)):
            found.append(
                record(variant, 99, 2.2 + shift + worse, tokens=2000, rate=rate, purpose="rate")
            )
    for share, shift in ((0.5, 0.1), (0.75, 0.04), (1.25, -0.03), (1.5, -0.05)):
        found += runs("dense", shift, tokens=int(4000 * share), purpose="length")
    for variant, shift in (("dense", 0.5), ("stem_half", 0.47), ("value", 0.51)):
        found += runs(variant, shift, text="code", purpose="second")
    for seed in range(6, 11):
        found.append(record("dense", seed, 2.0 + 0.003 * (seed % 4), purpose="aa"))
    found += runs("dense", 0.02, tokens=3600, purpose="planted")
    for variant, told in (("dense", 0.3), ("stem_half", 0.5), ("ngram", 0.7)):
        for seed in range(1, 6):
            share = told + 0.01 * seed + 0.001 * (seed * len(variant) % 7)
            measures = {"facts_told_several_tokens": share, "facts_untold_one_token": 0.0}
            one = record(variant, seed, text="facts", purpose="facts", documents={})
            one["measures"] = measures
            found.append(one)
    return copy.deepcopy(found)
