"""A run as Weights & Biases shows it, or as its files hold it until they are uploaded."""

import contextlib
import importlib.util
import netrc
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stem_jax.errors import InputError
from stem_jax.processes.process_log import log
from stem_jax.training.trackers.tracker import Book, Ending, Page, Row
from stem_jax.training.trackers.wandb_files import last_step


class WandbPage:
    """One run of wandb for all starts of a run, by an id that the run's folder keeps.

    wandb takes no step that is not above the last one, and a later start of a run without a network
    writes a file of its own. So what it has is asked of the server or read from the files.
    """

    def __init__(self, page: Page):
        self._page = page
        self._book = Book(page.folder, "wandb")
        self._run: Any = None
        self._last = 0

    @staticmethod
    def check(offline: bool, server: str | None) -> None:
        """Refuses what could only fail: no package, or nobody that the server would know."""
        if importlib.util.find_spec("wandb") is None:
            raise InputError(
                "tracking.trackers: wandb is not installed; pip install wandb, or take it out"
            )
        if offline or os.environ.get("WANDB_MODE", "online") != "online":
            return
        import wandb

        address = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
        if not _has_key(address):
            raise InputError(
                f"tracking.trackers: wandb has no key for {address}; run wandb login, "
                "set WANDB_API_KEY, or give tracking.offline=true for files to upload later"
            )

    def begin(self) -> int:
        """Goes on with the run of this folder's id."""
        if self._run is not None:
            return self._last
        import wandb

        page = self._page
        page.folder.mkdir(exist_ok=True)
        run_id = self._book.read().get("id")
        if run_id is None:
            run_id = secrets.token_hex(4)
            self._book.write(id=run_id)
        before = last_step(page.folder, run_id)
        settings = wandb.Settings(
            console="off",
            silent=True,
            login_timeout=page.timeout,
            init_timeout=page.timeout,
            finish_timeout=page.timeout,
        )
        self._run = run = wandb.init(
            project=page.project,
            name=page.name,
            id=run_id,
            resume="allow",
            dir=str(page.folder),
            mode="offline" if page.offline else None,
            config=page.config | page.facts,
            settings=settings,
        )
        if run.offline:
            self._last = before
            log.info(f"wandb: run {run_id} is kept in {page.folder / 'wandb'}, for wandb sync")
        else:
            self._last = run.starting_step - 1 if run.resumed else 0
            log.info(f"wandb: {run.url}")
        return self._last

    def renew(self) -> None:
        """The next page has another id."""
        if self._run is not None:
            self._run.finish()
        self._run = None
        self._book.write(id=secrets.token_hex(4))

    def write(self, rows: list[Row]) -> None:
        """Logs steps."""
        for row in rows:
            with self._alive():
                self._run.log(row.values, step=row.step, commit=True)
            self._last = row.step

    def write_text(self, name: str, text: str) -> None:
        """As a value of the summary."""
        with self._alive():
            self._run.summary[name] = text

    def write_picture(self, path: Path) -> None:
        """As a picture of the summary."""
        import wandb

        with self._alive():
            self._run.summary[path.stem] = wandb.Image(str(path))

    def close(self, ending: Ending) -> None:
        """Waits until all is uploaded, as long as `Page.timeout`."""
        with self._alive():
            self._run.finish(exit_code=int(ending is Ending.FAILED))

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """After an error the next `begin` starts wandb's own process anew: that may be gone."""
        try:
            yield
        except Exception:
            import wandb

            self._run = None
            with contextlib.suppress(Exception):
                wandb.teardown()
            raise


def _has_key(server: str) -> bool:
    """Whether there is a key for a server; asked for one, wandb would wait at the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(server).hostname or "") is not None
