"""What a request to the engine hears, and what the generator says to it alone."""

import threading


class Heard:
    """The steps of one request; on_step of `Engine.submit`."""

    def __init__(self):
        self.steps, self.ended = [], threading.Event()

    def __call__(self, step):
        assert not self.ended.is_set()
        self.steps.append(step)
        if step.finish is not None:
            self.ended.set()

    def tokens(self):
        """All of them, once it has ended."""
        assert self.ended.wait(300)
        return [step.token for step in self.steps]

    @property
    def finish(self):
        """Of the last step."""
        return self.steps[-1].finish


def alone(generator, request):
    """The tokens of a request with nothing else in the batch."""
    steps = generator.steps(
        [request.prompt_ids], request.max_new_tokens, request.sampling, [request.seed]
    )
    return [token for [token] in steps]
