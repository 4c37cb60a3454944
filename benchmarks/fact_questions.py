"""Tuning a model of the `facts` corpus on questions about half of the countries.

python -m benchmarks.fact_questions --write=runs/fact_questions
python -m benchmarks.fact_questions --measure=runs/sft_facts

The first writes `half.jsonl`, conversations about every second country, and `chat.jinja`; the
second asks a tuned model every question about both halves, greedily.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stem_jax.checkpoints.loading import LoadedRun, load_run
from stem_jax.data import facts
from stem_jax.data.chat_template import Chat, load_chat
from stem_jax.data.fact_questions import PLAIN_TEMPLATE, AskedFact, asked_facts, halves
from stem_jax.generation.generator import Generator
from stem_jax.generation.sampling import Sampling

# The longest answer has nine tokens.
_NEW_TOKENS = 16
_BATCH = 512
_SEED = 0


def main() -> None:
    """Writes, or measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="folder for half.jsonl and chat.jinja")
    parser.add_argument("--measure", type=Path, help="work folder of a tuned run")
    parser.add_argument("--json", action="store_true", help="print the shares as JSON")
    args = parser.parse_args()
    if (args.write is None) == (args.measure is None):
        parser.error("give --write or --measure")
    if args.write is not None:
        write(args.write)
        return
    found = measure(load_run(args.measure))
    print(json.dumps(found) if args.json else format_shares(found))


def write(folder: Path) -> None:
    """Writes the told questions about half of the countries, and a template for them."""
    folder.mkdir(parents=True, exist_ok=True)
    tuned, _ = halves(facts.read_facts())
    asked = [one for one in asked_facts(tuned) if one.told]
    random.Random(_SEED).shuffle(asked)
    lines = (json.dumps(one.record, ensure_ascii=False) for one in asked)
    (folder / "half.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "chat.jinja").write_text(PLAIN_TEMPLATE, "utf-8")
    print(f"{len(asked):,} questions about {len(tuned)} countries in {folder / 'half.jsonl'}")


def measure(run: LoadedRun, step: int = 1) -> dict[str, Any]:
    """Shares of questions that greedy decoding answers, and stops after, of each half and kind.

    step: ask every so many of them.
    """
    chat = load_chat(run.tokenizer)
    generator = Generator(run.config, run.params, run.rows, chat.prompt_tokenizer, run.mesh)
    found: dict[str, Any] = {}
    for half, countries in zip(("tuned", "other"), halves(facts.read_facts()), strict=True):
        for told in (True, False):
            asked = [one for one in asked_facts(countries) if one.told == told][::step]
            found[f"{half} {'told' if told else 'untold'}"] = _asked(generator, chat, asked)
    return found


def format_shares(found: dict[str, Any]) -> str:
    """A line for each kind of questions."""
    lines = ["| countries, questions | asked | right | stopped |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {one['asked']:,} | {one['right']:.1%} | {one['stopped']:.1%} |"
        for name, one in found.items()
    ]
    return "\n".join(lines)


def _asked(generator: Generator, chat: Chat, asked: Sequence[AskedFact]) -> dict[str, Any]:
    prompts = [chat.prompt(one.record["messages"][:1]) for one in asked]
    answers = generator.complete(
        prompts, _NEW_TOKENS, Sampling(0.0), batch_size=_BATCH, special=True
    )
    pairs = list(zip(asked, answers, strict=True))
    return {
        "asked": len(asked),
        "right": sum(given.text.strip() == one.answer for one, given in pairs) / len(asked),
        "stopped": sum(given.stop == "eos" for _, given in pairs) / len(asked),
    }


if __name__ == "__main__":
    sys.exit(main())
