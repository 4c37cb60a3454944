"""The adapter through which lm-evaluation-harness asks our model (lm-eval 0.4.13).

Numbers are those of the harness's own `hf` backend on the exported model. In particular every text
begins with bos, which `loglikelihood_rolling` therefore also scores, after bos itself; windows of a
long text begin with the token before them.

Several processes are given every request, and divide the batches that come of them (the harness's
own division asks for PyTorch): each has all answers. Process 0 alone shows progress.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm

from stem_jax.checkpoints.loading import LoadedRun
from stem_jax.errors import InputError
from stem_jax.evaluation.answer_settings import AnswerSettings
from stem_jax.evaluation.division import divide
from stem_jax.evaluation.progress import bars_off
from stem_jax.evaluation.scoring import Scorer
from stem_jax.generation.completion import TextStream
from stem_jax.generation.generator import Generator, sequence_seeds


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Prompts (ids) to continue together, with a seed of each."""

    prompts: list[list[int]]
    seeds: list[int]
    settings: AnswerSettings


class HarnessModel(TemplateLM):
    """A loaded run as the harness sees a language model.

    truncated: requests so far whose beginning did not fit into the context.
    """

    def __init__(
        self,
        run: LoadedRun,
        batch_size: int = 16,
        max_gen_toks: int = 256,
        progress: bool = True,
        seed: int = 0,
    ):
        """Args:
        batch_size: sequences at a time.
        max_gen_toks: new tokens where a task does not say how many.
        progress: draw bars on stderr, if it is a terminal.
        seed: of the samples, in tasks that ask for them.

        Raises:
            InputError: a batch without sequences.
        """
        super().__init__()
        self._scorer = Scorer(run, batch_size)
        self._generator = Generator(run.config, run.params, run.rows, run.tokenizer, run.mesh)
        self._tokenizer = run.tokenizer
        self._batch_size = batch_size
        self._max_gen_toks = max_gen_toks
        self._bars_off = bars_off(progress)
        self._seed = seed
        self._expected: list[Task] = []
        self.truncated = 0

    def expect(self, tasks: Iterable[Task]) -> None:
        """All tasks whose requests are going to come.

        When the first request comes, all are checked: else one might be refused after hours.
        """
        self._expected = list(tasks)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """bos, which precedes a text that has no context."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The context: tokens that a scored one may follow."""
        return self._scorer.context

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.kind}-{self._tokenizer.fingerprint[:12]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Ids of a text in which the texts of special tokens are these tokens.

        As a prompt begins: always, never, or (None) where it does not begin so by itself.
        """
        if add_special_tokens is None:
            return self._tokenizer.encode_prompt(string, special=True)
        first = self._tokenizer.special.begin_ids if add_special_tokens else ()
        return [*first, *self._tokenizer.encode_special(string)]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation in nats, whether it is greedy) of each request."""
        self._check_expected()
        return super().loglikelihood(requests, disable_tqdm or self._bars_off)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """The same for (request, context ids, continuation ids), cut from the left to fit."""
        sequences = []
        for texts, context, continuation in requests:
            self._check_continuation(texts[1] if texts else "", continuation)
            whole = context + continuation
            self.truncated += len(whole) > self.max_length + 1
            sequences.append(whole[-(self.max_length + 1) :])
        with self._bar("scoring", len(sequences), disable_tqdm) as bar:
            scores = self._scorer.score(sequences, bar.update)
        answers = []
        for (texts, _context, continuation), score in zip(requests, scores, strict=True):
            n = len(continuation)
            answer = float(score.log_likelihoods[-n:].sum()), bool(score.greedy[-n:].all())
            answers.append(answer)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood in nats of each text, in windows that fill the context."""
        self._check_expected()
        windows, owners = [], []
        for index, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (likelihood, _) in zip(owners, answers, strict=True):
            totals[owner] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, a stop id, or as many tokens as the task allows."""
        self._check_expected()
        settings = [self._settings(request) for request in requests]
        prompts = []
        for request, wanted in zip(requests, settings, strict=True):
            ids = self.tok_encode(request.args[0])
            self.truncated += len(ids) > self.max_length - wanted.room
            prompts.append(ids[-(self.max_length - wanted.room) :])
        seeds = sequence_seeds(self._seed, prompts)

        def kind(index: int) -> str:
            return repr(settings[index])

        order = sorted(range(len(requests)), key=lambda i: (kind(i), -len(prompts[i])))
        batches = []
        for _, group in itertools.groupby(order, key=kind):
            while batch := list(itertools.islice(group, self._batch_size)):
                own = [prompts[i] for i in batch], [seeds[i] for i in batch]
                batches.append(_Batch(*own, settings[batch[0]]))
        with self._bar("generating", len(requests), disable_tqdm) as bar:

            def on_done(done: Sequence[_Batch]) -> None:
                bar.update(sum(len(batch.prompts) for batch in done))

            found = divide(batches, lambda own: map(self._complete, own), on_done)
        texts = dict(zip(order, itertools.chain.from_iterable(found), strict=True))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _settings(self, request: Instance) -> AnswerSettings:
        return AnswerSettings.from_task(
            request.task_name, request.args[1], self.max_gen_toks, self.max_length
        )

    def _check_expected(self) -> None:
        """Refuses, before the first request, whatever a later one would be refused for."""
        tasks, self._expected = self._expected, []
        for request in (request for task in tasks for request in task.instances):
            if request.request_type == "generate_until":
                self._settings(request)
            elif request.request_type == "loglikelihood":
                context, continuation = request.args
                # Encoding takes as long as building the requests did. A token has a byte or more.
                spaces = len(context) - len(context.rstrip())
                if not 0 < len(continuation.encode()) + spaces <= self.max_length:
                    _, ids = self._encode_pair(context, continuation) if context else ([], [])
                    ids = ids or self.tok_encode(continuation, add_special_tokens=False)
                    self._check_continuation(continuation, ids, request.task_name)

    def _check_continuation(self, text: str, ids: list[int], task: str | None = None) -> None:
        if not 0 < len(ids) <= self.max_length:
            whose = "" if task is None else f" of task {task!r}"
            raise InputError(
                f"the continuation {text[:40]!r}{whose} has {len(ids)} tokens, the context of "
                f"train.seq_len={self.max_length} takes 1 to {self.max_length}; leave the task "
                "out, or train with a longer train.seq_len"
            )

    def _complete(self, batch: _Batch) -> list[str]:
        prompts, settings = batch.prompts, batch.settings
        # Batches of a power of two, so that few programs are compiled.
        filling = (1 << (len(prompts) - 1).bit_length()) - len(prompts)
        steps = self._generator.steps(
            prompts + prompts[-1:] * filling,
            settings.room,
            settings.sampling,
            batch.seeds + batch.seeds[-1:] * filling,
        )
        streams = [TextStream(self._tokenizer, prompt) for prompt in prompts]
        texts = [""] * len(prompts)
        going = set(range(len(prompts)))
        for tokens in steps:
            for index in list(going):
                token = tokens[index]
                if token is None or token in self._tokenizer.special.stop_ids:
                    going.remove(index)
                    continue
                texts[index] += streams[index].push(token)
                if any(stop and stop in texts[index] for stop in settings.until):
                    going.remove(index)
            if not going:
                break
        whole = [text + stream.flush() for text, stream in zip(texts, streams, strict=True)]
        return [postprocess_generated_text(text, list(settings.until), None) for text in whole]

    def _bar(self, name: str, total: int, off: bool) -> tqdm:
        return tqdm(total=total, desc=name, unit=" requests", disable=off or self._bars_off)
