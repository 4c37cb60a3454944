"""A run as MLflow's tracking server shows it."""

import importlib.util
import json
import os
import secrets
from pathlib import Path

from stem_jax.errors import InputError
from stem_jax.processes.process_log import log
from stem_jax.training.trackers.tracker import Book, Ending, Page, Row

SERVER = "MLFLOW_TRACKING_URI"
# By which a run is found again whose id did not get here.
_MARK = "stem_jax.run"
# A server takes no more in one request.
_MOST_METRICS, _MOST_PARAMS, _MOST_CHARACTERS = 1000, 100, 6000
_STATUS = {Ending.COMPLETE: "FINISHED", Ending.STOPPED: "KILLED", Ending.FAILED: "FAILED"}
# A client that tries again by itself for minutes would hold up the end of a run; and it would print
# among what the run says.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowPage:
    """One run of MLflow for all starts of a run.

    The metric `step` says how far the server is: a request is taken whole or not at all.
    """

    def __init__(self, page: Page):
        self._page = page
        self._book = Book(page.folder, "mlflow")
        self._id = ""

    @staticmethod
    def check(offline: bool, server: str | None) -> None:
        """Refuses what could only fail: no package, or no server."""
        if importlib.util.find_spec("mlflow") is None:
            raise InputError(
                "tracking.trackers: mlflow is not installed; pip install mlflow-skinny, or take it "
                "out"
            )
        if server is None and not os.environ.get(SERVER):
            raise InputError(
                f"tracking.trackers: mlflow needs its server: set tracking.mlflow_uri or {SERVER}, "
                "such as http://HOST:5000, or take it out"
            )

    def begin(self) -> int:
        """Goes on with this folder's run on the server."""
        for key, value in _SETTINGS.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient

        page = self._page
        self._client = client = MlflowClient(tracking_uri=page.server)
        known = self._book.read()
        mark = known.get("mark")
        if mark is None:
            mark = secrets.token_hex(8)
            self._book.write(mark=mark)
        first = not self._id
        self._id = known.get("id") or self._find(mark)
        self._book.write(mark=mark, id=self._id)
        client.update_run(self._id, status="RUNNING")
        run = client.get_run(self._id)
        self._describe(run.data.params)
        if first:
            log.info(f"mlflow: run {run.info.run_name} ({self._id}) of {page.project}")
        return int(run.data.metrics.get("step", 0))

    def renew(self) -> None:
        """The next run has another mark."""
        self._client.set_terminated(self._id, status=_STATUS[Ending.STOPPED])
        self._id = ""
        self._book.write(mark=secrets.token_hex(8))

    def write(self, rows: list[Row]) -> None:
        """Adds the metrics of steps."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for row in rows:
            milliseconds = int(row.seconds * 1000)
            values = row.values | {"step": float(row.step)}
            found = [Metric(name, v, milliseconds, row.step) for name, v in values.items()]
            if len(batch) + len(found) > _MOST_METRICS:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += found
        self._client.log_batch(self._id, metrics=batch)

    def write_text(self, name: str, text: str) -> None:
        """As an artifact."""
        self._client.log_text(self._id, text, f"{name}.txt")

    def write_picture(self, path: Path) -> None:
        """As an artifact."""
        self._client.log_artifact(self._id, str(path))

    def close(self, ending: Ending) -> None:
        """Says how it ended."""
        self._client.set_terminated(self._id, status=_STATUS[ending])

    def _find(self, mark: str) -> str:
        """The run of a mark, or a new one."""
        client, page = self._client, self._page
        experiment = client.get_experiment_by_name(page.project)
        number = experiment.experiment_id if experiment else client.create_experiment(page.project)
        found = client.search_runs([number], f"tags.`{_MARK}` = '{mark}'")
        if found:
            return found[0].info.run_id
        run = client.create_run(number, run_name=page.name, tags={_MARK: mark})
        return run.info.run_id

    def _describe(self, there: dict[str, str]) -> None:
        """Gives the run its configuration. Parameters never change; what has, stands in a tag."""
        from mlflow.entities import Param, RunTag

        told = {key: _short(value) for key, value in self._page.config.items()}
        params = [Param(key, text) for key, text in told.items() if key not in there]
        tags = {k: t for k, t in told.items() if there.get(k, t) != t} | self._page.facts
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MOST_PARAMS])
        self._client.log_batch(self._id, tags=[RunTag(key, text) for key, text in tags.items()])


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:_MOST_CHARACTERS]
