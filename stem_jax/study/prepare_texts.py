"""Fetches and prepares a text of the study.

python -m stem_jax.study.prepare_texts --text=prose --out=texts/prose
"""

import json
from typing import Any

from stem_jax import cli
from stem_jax.study.texts import prepare_text


def main(argv: list[str]) -> None:
    """Parses flags, prepares, and prints what is there."""
    parser = cli.Parser("stem_jax.study.prepare_texts", __doc__)
    parser.add_path("--out", required=True, help="folder of the prepared text")
    parser.add_argument("--text", default="prose", help="prose, code or facts")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the tokenizer")
    parser.add_argument("--processes", type=int, help="that tokenize; all cores if not given")
    parser.add_argument("--json", action="store_true", help="print text.json instead of a table")
    args = parser.parse_args(argv)
    text = prepare_text(args.text, args.out, args.vocab_size, processes=args.processes)
    record = text.record
    print(json.dumps(record) if args.json else _table(record))


def _table(record: dict[str, Any]) -> str:
    lines = [
        f"{'package':<16}{'version':<12}{'split':<7}{'kept':>6}{'exact':>7}{'near':>6}  licence"
    ]
    for package in record["packages"]:
        lines.append(
            f"{package['name']:<16}{package['version']:<12}{package['split']:<7}"
            f"{package['documents']:>6}{package['exact']:>7}{package['near']:>6}"
            f"  {package['licence']}"
        )
    lines += ["", f"{'split':<7}{'documents':>10}{'bytes':>13}{'tokens':>13}  13-grams in training"]
    for split, count in record["counts"].items():
        share = record.get("overlap", {}).get(split)
        lines.append(
            f"{split:<7}{count['documents']:>10,}{count['bytes']:>13,}{count['tokens']:>13,}"
            f"  {'-' if share is None else format(share, '.2%')}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
