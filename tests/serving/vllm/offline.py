"""Completes prompts with vLLM, in its environment: offline.py JOB ANSWER

Job: {"llm": arguments of `LLM`, "prompts": lists of token ids, "tokens": of each completion}.
Answer: for each prompt its tokens, and how far each one's log-probability is above the next.
"""

import json
import sys
from pathlib import Path


def main(job_path: str, answer_path: str) -> None:
    """Each prompt twice: the second time its prefix is in the cache."""
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_path).read_text())
    llm = LLM(**job["llm"])
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, logprobs=2, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = []
    for _ in range(2):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answers.append([_read(output.outputs[0]) for output in outputs])
    first, again = answers
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    answer = {"first": first, "again": again, "cached_tokens": cached}
    Path(answer_path).write_text(json.dumps(answer))


def _read(completion) -> list[tuple[int, float]]:
    tokens = []
    for token, found in zip(completion.token_ids, completion.logprobs):
        best, second = sorted((entry.logprob for entry in found.values()), reverse=True)[:2]
        tokens.append((token, best - second))
    return tokens


if __name__ == "__main__":
    main(*sys.argv[1:])
