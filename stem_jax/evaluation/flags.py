"""The flags of `python -m stem_jax.evaluate`: one of five measurements, and what each takes."""

import argparse
from collections.abc import Callable
from typing import Any

from stem_jax import cli
from stem_jax.data.formats import FORMATS
from stem_jax.evaluation.limits import DEPTHS
from stem_jax.processes.cluster import add_flags

# The flags that not every measurement has, with those that do.
_ONLY = {
    **dict.fromkeys(("num_fewshot", "max_gen_toks", "log_samples"), ("tasks",)),
    **dict.fromkeys(("lengths", "depths", "keys", "samples", "seed"), ("niah",)),
    "limit": ("tasks", "perplexity", "facts", "memorization"),
    **dict.fromkeys(("text_field", "format", "by_frequency"), ("perplexity",)),
}


def parse(argv: list[str], description: str | None) -> argparse.Namespace:
    """The flags; `out` is filled in. Exits with 2 for wrong ones, 0 for --help."""
    parser = cli.Parser("stem_jax.evaluate", description)
    add = parser.add_argument
    parser.add_run_folder("--workdir", required=True, help="folder of a training run")
    mode = parser.add_mutually_exclusive_group(required=True)
    names = {"parser": mode, "type": _list(str)}
    tasks = "tasks of lm-eval, folders of task YAMLs (comma-separated)"
    parser.add_names("--tasks", help=tasks, **names)
    texts = "bits per byte of built-in corpora, files, folders of token stores"
    parser.add_names("--perplexity", help=texts, **names)
    mode.add_argument("--niah", action="store_true", help="needle in a haystack")
    mode.add_argument("--facts", action="store_true", help="what the facts corpus tells")
    easier = "how much easier trained text is than like text that was held out"
    mode.add_argument("--memorization", action="store_true", help=easier)
    add("--step", type=int, help="checkpoint; without it, the newest")
    add("--resident-rows", type=int, help="table rows kept on the devices")
    add("--devices", type=int, default=1, help="of each process, that the model is divided over")
    add("--batch-size", type=int, default=16, help="sequences at a time")
    parser.add_result("--out", help="JSON file; without it, WORKDIR/evaluation/MODE.json")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--no-progress", action="store_true", help="draw no bars")
    add("--limit", type=int, help="examples of a task, documents, countries, pieces; or all")
    add("--text-field", help="perplexity: of files; without it, the run's")
    add("--format", choices=FORMATS, help="perplexity: of files; without it, the run's")
    often = "perplexity: also by how often the run was trained on a token"
    add("--by-frequency", action="store_true", help=often)
    add("--num-fewshot", type=int, help="tasks: examples before each question")
    add(
        "--max-gen-toks",
        type=int,
        default=256,
        help="tasks: longest answer, where a task does not say",
    )
    add("--log-samples", action="store_true", help="tasks: write every answer")
    add("--lengths", type=_list(int), help="niah: tokens; without it, up to the context")
    add("--depths", type=_list(float), default=list(DEPTHS), help="niah: 0 is the beginning")
    add("--keys", type=_list(int), default=[1], help="niah: needles in a haystack")
    add("--samples", type=int, default=20, help="niah: prompts for each length and depth")
    add("--seed", type=int, default=0, help="niah: of the prompts")
    add_flags(parser)
    parser.add_cache_flag()
    args = parser.parse_args(argv)
    modes = ("niah", "facts", "memorization", "tasks", "perplexity")
    name = next(mode for mode in modes if getattr(args, mode) not in (None, False))
    for flag, takers in _ONLY.items():
        if name not in takers and getattr(args, flag) != parser.get_default(flag):
            listed = " or ".join(f"--{mode}" for mode in takers)
            parser.error(f"--{flag.replace('_', '-')} belongs to {listed}, not to --{name}")
    args.out = args.out or args.workdir / "evaluation" / f"{name}.json"
    if args.niah and args.out.suffix.lower() == ".png":
        parser.error(f"--out={args.out} must be the JSON file; the picture is put beside it")
    return args


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def items(text: str) -> list[Any]:
        found = [kind(item.strip()) for item in text.split(",") if item.strip()]
        if not found:
            raise argparse.ArgumentTypeError("is empty")
        return found

    items.__name__ = f"list of {kind.__name__}"
    return items
