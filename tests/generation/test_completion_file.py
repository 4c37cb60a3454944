"""Jobs of completions: every line whole, none twice, none left out, whenever they are killed."""

import json
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest

from stem_jax import cli, generate
from stem_jax.data import chat_template
from stem_jax.data.chat_template import Chat
from stem_jax.errors import InputError
from stem_jax.generation import completion_file, conversations
from stem_jax.generation.completion import Completion
from stem_jax.generation.completion_file import CompletionFile
from tests import saved_models

JOB = {"prompts": "abc", "seed": 0}
PROMPTS = [f"prompt number {number}" for number in range(12)]


def completion(number: int) -> Completion:
    return Completion(f"p{number}", f"t{number} é", [number], "length", None)


def write(path, job, numbers) -> int:
    """The lines that were there before these were added."""
    with CompletionFile.open(path, job) as file:
        before = file.done
        file.add([completion(number) for number in numbers])
    return before


def test_it_goes_on_behind_the_last_whole_line(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    assert write(path, JOB, [0, 1]) == 0
    whole = path.read_bytes()
    for cut in (b"", b'{"index": 2, "prompt"', "{é".encode()[:-1]):
        path.write_bytes(whole + cut)
        with CompletionFile.open(path, JOB) as file:
            assert file.done == 2
    assert write(path, JOB, [2]) == 2
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    expected = {"index": 2, "prompt": "p2", "text": "t2 é", "tokens": [2], "stop": "length"}
    assert json.loads(lines[2]) == expected
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.jsonl", "out.jsonl.job.json"]


def test_what_was_added_is_on_the_disk(tmp_path):
    path = tmp_path / "out.jsonl"
    with CompletionFile.open(path, JOB) as file:
        for number in range(3):
            file.add([completion(number)])
            assert len(path.read_bytes().splitlines()) == number + 1


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({**JOB, "seed": 1}, "was begun with seed 0, not 1; choose another file"),
        ({**JOB, "prompts": "f" * 64}, "with other prompts than --prompt, --prompt-file or --chat"),
        ({**JOB, "edits": ["f" * 64]}, "was begun with other files than --edits gives now"),
        ({"prompts": "abc"}, "was begun with seed 0, not None"),
        ({**JOB, "top_k": 4}, "was begun with top_k None, not 4"),
    ],
)
def test_another_job_is_refused(tmp_path, job, message):
    path = tmp_path / "out.jsonl"
    write(path, JOB, [0])
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        write(path, job, [0])
    assert path.read_bytes() == before


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("mine\n")
    with pytest.raises(InputError, match=r"exists, and out\.jsonl\.job\.json is not beside it"):
        write(path, JOB, [0])
    (tmp_path / "out.jsonl.job.json").write_text(json.dumps(JOB))
    with pytest.raises(InputError, match="line 1 is not JSON"):
        write(path, JOB, [0])
    path.write_text('{"index": 0}\n{"index": 2}\n')
    with pytest.raises(InputError, match="line 2 is not of prompt 1"):
        write(path, JOB, [0])
    with (
        CompletionFile.open(tmp_path / "other.jsonl", JOB),
        pytest.raises(InputError, match="is being written by another process"),
    ):
        write(tmp_path / "other.jsonl", JOB, [0])


@pytest.fixture(scope="module")
def job(train_step, make_batch, tmp_path_factory):
    """Flags of a job, and where it writes."""
    workdir = saved_models.run_folders({"stem": {}}, train_step, make_batch, tmp_path_factory)
    folder = tmp_path_factory.mktemp("job")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [f"--workdir={workdir('stem')}", f"--prompt-file={folder / 'prompts.txt'}"]
    return [*flags, "--max-new-tokens=8", "--temperature=3", "--batch-size=4"], folder


def _run(monkeypatch, capsys, *flags):
    """Exit status, stdout and stderr of the entry point, in this process."""
    monkeypatch.setattr(sys, "argv", ["generate", *flags])
    try:
        cli.run(generate.main)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def test_a_job_goes_on_with_equal_lines(job, monkeypatch, capsys):
    flags, folder = job
    whole, cut = folder / "whole.jsonl", folder / "cut.jsonl"
    assert _run(monkeypatch, capsys, *flags, "--json")[0] == 0
    status, out, _ = _run(monkeypatch, capsys, *flags, f"--out={whole}")
    assert (status, out) == (0, f"{whole}: 12 completions\n")
    lines = whole.read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS
    assert len({json.loads(line)["text"] for line in lines}) == 12
    # As if killed in the middle of the sixth line.
    record = (folder / "whole.jsonl.job.json").read_text()
    (folder / "cut.jsonl.job.json").write_text(record)
    cut.write_text("\n".join(lines[:5]) + "\n" + lines[5][:9])
    status, _, error = _run(monkeypatch, capsys, *flags, f"--out={cut}")
    assert (status, error) == (0, "note: 5 of 12 are there already\n")
    assert cut.read_text() == whole.read_text()
    status, _, error = _run(monkeypatch, capsys, *flags, "--seed=1", f"--out={cut}")
    assert status == 1 and "was begun with seed 0, not 1" in error
    # Prompts that are refused leave no file behind.
    bad = _run(monkeypatch, capsys, *flags, f"--prompt={'p' * 200}", f"--out={folder / 'b'}")
    assert bad[0] == 1 and not list(folder.glob("b*"))
    wrong = _run(monkeypatch, capsys, *flags, "--json", f"--out={cut}")
    assert wrong[0] == 2 and "leave --json out" in wrong[2]


class _Tomorrow(datetime):
    """A day later."""

    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + timedelta(days=1)


def test_a_job_of_dated_prompts_goes_on_on_another_day(job, monkeypatch, capsys):
    flags, folder = job
    # Which refuses bytes: no special token has a text there.
    monkeypatch.setattr(
        conversations, "load_chat", lambda tokenizer, path: Chat(tokenizer, path.read_text(), "x")
    )
    (folder / "dated.jinja").write_text("{{ strftime_now('%F') }}{{ messages[0].content }}:")
    chat = ["--chat", f"--chat-template={folder / 'dated.jinja'}", f"--out={folder / 'dated'}"]
    status, _, error = _run(monkeypatch, capsys, *flags, *chat)
    assert status == 0, error
    whole = (folder / "dated").read_text()
    assert json.loads(whole.splitlines()[0])["prompt"].startswith(f"{datetime.now():%F}prompt")
    for now in (_Tomorrow, datetime):
        for module in (chat_template, completion_file):
            monkeypatch.setattr(module, "datetime", now)
        (folder / "dated").write_text("".join(whole.splitlines(keepends=True)[:5]))
        assert _run(monkeypatch, capsys, *flags, *chat)[0] == 0
        assert (folder / "dated").read_text() == whole
        # Then as an earlier version began it.
        record = json.loads((folder / "dated.job.json").read_text())
        record.pop("date", None)
        (folder / "dated.job.json").write_text(json.dumps(record))
    (folder / "dated.job.json").write_text(json.dumps(record | {"date": "soon"}))
    status, _, error = _run(monkeypatch, capsys, *flags, *chat)
    assert status == 1 and "date is 'soon', which is no date" in error


@pytest.mark.long
@pytest.mark.little_effort
def test_killed_jobs_go_on(job):
    flags, folder = job
    (folder / "many.txt").write_text("\n".join(PROMPTS * 8))
    flags = [*flags, f"--prompt-file={folder / 'many.txt'}", "--batch-size=2"]
    command = [sys.executable, "-m", "stem_jax.generate", *flags]
    subprocess.run([*command, f"--out={folder / 'all.jsonl'}"], check=True, timeout=600)
    out = folder / "killed.jsonl"
    kills = 0
    for wait in (10, 40, 80):
        process = subprocess.Popen([*command, f"--out={out}"], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if out.exists() and out.read_bytes().count(b"\n") >= wait:
                process.send_signal(signal.SIGKILL)
                kills += process.wait(60) == -signal.SIGKILL
            time.sleep(0.005)
    assert kills > 0
    with out.open("ab") as file:
        file.write(b'{"index": ')
    subprocess.run([*command, f"--out={out}"], check=True, timeout=600)
    assert out.read_bytes() == (folder / "all.jsonl").read_bytes()
