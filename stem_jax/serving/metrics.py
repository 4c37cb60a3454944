"""Counts of a server in Prometheus' text format."""

from collections import Counter

from stem_jax.prometheus import metric, samples
from stem_jax.serving.service import Service

# Of the engine's counts, those by how requests ended.
_FINISHED = "requests_total_"
_HELP = {
    "running": "Sequences in slots.",
    "waiting": "Sequences in the queue.",
    "slots": "Sequences that can run at once.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "new_tokens_total": "Tokens that were made.",
    "steps_total": "Steps of the engine.",
    "compiled_programs": "Programs that are compiled; it stays what it is at the start.",
}


class Metrics:
    """What /metrics says."""

    def __init__(self, service: Service):
        self._service = service
        self._answers: Counter[tuple[str, int]] = Counter()

    def add(self, path: str, status: int) -> None:
        """Of an answer that has begun."""
        self._answers[path, status] += 1

    def text(self) -> str:
        """All of them."""
        service, lines = self._service, []
        stats = service.engine.stats()
        finished = [name for name in stats if name.startswith(_FINISHED)]
        for name, value in stats.items():
            if name in finished:
                continue
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += metric(name, kind, _HELP.get(name, name), [({}, value)])
        by_finish = [({"finish": n.removeprefix(_FINISHED)}, stats[n]) for n in finished]
        lines += metric("sequences_total", "counter", "Sequences by how they ended.", by_finish)
        answers = [
            ({"path": path, "status": str(status)}, count)
            for (path, status), count in sorted(self._answers.items())
        ]
        lines += metric("http_answers_total", "counter", "Answers by path and status.", answers)
        ready = not service.draining and service.engine.ready
        lines += metric("ready", "gauge", "1 while requests are taken.", [({}, int(ready))])
        name = "first_token_seconds"
        lines += metric(name, "summary", "From a request to its first token.", [])
        lines += samples(f"{name}_sum", [({}, service.first_token_seconds)])
        lines += samples(f"{name}_count", [({}, service.first_tokens)])
        return "\n".join(lines) + "\n"
