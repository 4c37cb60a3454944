"""A server under many clients that ask, leave and send nonsense: is every token right?

python -m benchmarks.server_load [--clients=64] [--seconds=60] [--slots=8] [--questions=128]

A server of its own process with a small random model, in float32 on CPUs; clients of `openai` in
this one. Every answer is compared with what `Generator` gives to the question alone, token by
token; what is otherwise is printed with the difference of the two best logits, noise of the sampler
included. Memory is the server's resident set, at half of the time and at its end.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import jax
import openai
import psutil

from benchmarks.children import environment
from benchmarks.server_questions import Known, Question, Reference, make_run, questions
from stem_jax.serving.token_text import TokenTexts

_NAME = "load"
# Logits closer than this may be told apart otherwise in a batch of another shape.
_TIE = 1e-4
# Bodies, their type and the status that is to come.
_NONSENSE = [
    (b"{", "application/json", 400),
    (b'{"model": "load", "prompt": [258]}', "application/json", 400),
    (b'{"model": "load", "prompt": "x", "n": 0}', "application/json", 400),
    (b'{"model": "load", "prompt": "' + b"x" * 5000 + b'"}', "application/json", 400),
    (b'{"model": "other", "prompt": "x"}', "application/json", 404),
    (b"prompt=x", "application/x-www-form-urlencoded", 415),
]


class Load:
    """Clients at work. counts: by what they did. wrong: (question, tokens or what came instead)."""

    def __init__(self, address: str, asked: list[Question], known: list[Known], texts: TokenTexts):
        self._address, self._asked, self._texts = address, asked, texts
        self._expected = [[texts.token(token, 0).text for token in k.tokens] for k in known]
        self._stops = {texts.token(token, 0).text for token in (257,)}
        self.counts: Counter[str] = Counter()
        self.tokens = 0
        self.wrong: list[tuple[int, object]] = []

    async def run(self, clients: int, seconds: float) -> None:
        """So many at once, for so long."""
        end = time.monotonic() + seconds
        # As many connections as clients: one that waits for a connection asks nothing.
        limits = httpx.Limits(max_connections=None)
        async with (
            openai.AsyncOpenAI(
                base_url=f"{self._address}/v1", api_key="none", max_retries=0, timeout=600
            ) as client,
            httpx.AsyncClient(base_url=self._address, timeout=600, limits=limits) as raw,
        ):
            await asyncio.gather(*(self._client(client, raw, n, end) for n in range(clients)))

    async def _client(
        self, client: openai.AsyncOpenAI, raw: httpx.AsyncClient, number: int, end: float
    ) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            kind = rng.choices(["whole", "stream", "leave", "nonsense"], [4, 4, 1, 1])[0]
            index = rng.randrange(len(self._asked))
            try:
                await getattr(self, f"_{kind}")(client, raw, rng, index)
                self.counts[kind] += 1
            except openai.APIError as error:
                self.wrong.append((index, repr(error)))

    async def _whole(self, client, raw, rng, index: int) -> None:
        answer = await client.completions.create(
            model=_NAME, logprobs=0, **self._asked[index].body()
        )
        [choice] = answer.choices
        self._check(index, choice.logprobs.tokens, choice.finish_reason)
        self.tokens += answer.usage.completion_tokens

    async def _stream(self, client, raw, rng, index: int) -> None:
        tokens, finish = [], None
        options = {"include_usage": True}
        async for chunk in await client.completions.create(
            model=_NAME,
            logprobs=0,
            stream=True,
            stream_options=options,
            **self._asked[index].body(),
        ):
            for choice in chunk.choices:
                tokens += choice.logprobs.tokens
                finish = choice.finish_reason
            self.tokens += chunk.usage.completion_tokens if chunk.usage else 0
        self._check(index, tokens, finish)

    async def _leave(self, client, raw, rng, index: int) -> None:
        """Goes before the answer is whole, or before it has begun."""
        body = {"model": _NAME, "prompt": "x", "max_tokens": 120, "stream": rng.random() < 0.5}
        with contextlib.suppress(httpx.TimeoutException):
            patience = httpx.Timeout(rng.uniform(0.05, 3), connect=600)
            async with raw.stream("POST", "/v1/completions", json=body, timeout=patience) as answer:
                async for _ in answer.aiter_lines():
                    break

    async def _nonsense(self, client, raw, rng, index: int) -> None:
        content, kind, status = rng.choice(_NONSENSE)
        headers = {"content-type": kind}
        answer = await raw.post("/v1/completions", content=content, headers=headers)
        if answer.status_code != status or "error" not in answer.json():
            self.wrong.append((index, f"{content[:40]!r}: status {answer.status_code}"))

    def _check(self, index: int, tokens: list[str], finish: str | None) -> None:
        expected = self._expected[index]
        # An answer does not show the token that ends it.
        stops = bool(expected) and expected[-1] in self._stops
        right = (expected[:-1], "stop") if stops else (expected, "length")
        if (tokens, finish) != right:
            self.wrong.append((index, tokens))


async def _loaded(load: Load, clients: int, seconds: float, server: psutil.Process) -> list[int]:
    """The server's memory, in bytes, at half of the time and at its end."""
    running = asyncio.ensure_future(load.run(clients, seconds))
    found = []
    for _ in range(2):
        await asyncio.sleep(seconds / 2)
        found.append(server.memory_info().rss)
    await running
    return found


@contextlib.contextmanager
def started(workdir: Path, slots: int, queue: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server that is ready, and its address; told to stop at the end, and expected to."""
    flags = [f"--workdir={workdir}", "--port=0", f"--slots={slots}", f"--max-queue={queue}"]
    command = [sys.executable, "-m", "stem_jax.serve", *flags, f"--model-name={_NAME}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            yield server, server.stdout.readline().split()[-1]
        finally:
            server.terminate()
        if server.wait(120) != 0:
            raise SystemExit(f"the server ended with status {server.returncode}")


def programs(address: str) -> int:
    """How many the server has compiled."""
    lines = httpx.get(f"{address}/metrics", timeout=600).text.splitlines()
    [count] = [line.split()[1] for line in lines if line.startswith("stem_compiled_programs ")]
    return int(float(count))


def measure(clients: int, seconds: float, slots: int, number: int) -> dict:
    """Loads a server; what was wrong is printed."""
    asked = questions(number)
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        reference = Reference(Path(folder))
        known = [reference.known(question) for question in asked]
        with started(Path(folder), slots, queue=clients) as (server, address):
            texts = TokenTexts(reference.generator.tokenizer)
            load = Load(address, asked, known, texts)
            before = programs(address)
            rss = asyncio.run(_loaded(load, clients, seconds, psutil.Process(server.pid)))
            compiled_later = programs(address) - before
    ties = 0
    for index, found in load.wrong:
        gap = None
        if isinstance(found, list):
            places = zip([texts.token(t, 0).text for t in known[index].tokens], found)
            place = next((p for p, (one, other) in enumerate(places) if one != other), len(found))
            gap = reference.gap(asked[index], known[index], place)
            ties += gap < _TIE
        print(f"differs: {asked[index]}, found {found}, the two best differ by {gap}")
    return {
        "clients": clients,
        "seconds": seconds,
        "slots": slots,
        **load.counts,
        "wrong": len(load.wrong) - ties,
        "ties": ties,
        "tokens_per_second": round(load.tokens / seconds, 1),
        "compiled_later": compiled_later,
        "rss_mib_at_half": round(rss[0] / 2**20, 1),
        "rss_mib_at_end": round(rss[1] / 2**20, 1),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Runs the benchmark and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--questions", type=int, default=128)
    args = parser.parse_args()
    result = measure(args.clients, args.seconds, args.slots, args.questions)
    print(json.dumps(result, indent=2))
    if result["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
