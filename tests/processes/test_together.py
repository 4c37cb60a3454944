"""Programs that are run by several processes give the bytes of one, and say no together."""

import contextlib
import json
import signal
import subprocess
import time

import pytest

from stem_jax import analyze, edit, export, generate, import_torch
from tests.children import finish, gang
from tests.facts_model import FOLDER as MODEL

pytestmark = [pytest.mark.long, pytest.mark.little_effort]
PROMPTS = [f"The capital of {name} is" for name in ("Spain", "Peru", "Japan", "Chile", "Italy")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The committed model of the facts."""
    folder = tmp_path_factory.mktemp("facts") / "run"
    import_torch.main(["--from=hf", f"--path={MODEL}", f"--workdir={folder}"])
    return folder


def _run(program: str, *argv: str, count: int = 2, code: int = 0) -> list[str]:
    """What each of so many processes says, which all get the same flags."""
    with contextlib.ExitStack() as stack:
        every = gang(f"stem_jax.{program}", *[list(argv)] * count)
        processes = [stack.enter_context(one) for one in every]
        return [finish(process, code) for process in processes]


def _files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("count", [2, 4])
def test_completions(run_folder, tmp_path, count):
    (tmp_path / "prompts").write_text("\n".join(PROMPTS) + "\n")
    flags = [f"--workdir={run_folder}", f"--prompt-file={tmp_path / 'prompts'}"]
    flags += ["--max-new-tokens=6", "--batch-size=1", "--seed=3"]
    generate.main([*flags, f"--out={tmp_path / 'one.jsonl'}"])
    one = (tmp_path / "one.jsonl").read_bytes()
    assert one.count(b"\n") == len(PROMPTS)
    out = tmp_path / "all.jsonl"
    said = _run("generate", *flags, f"--out={out}", count=count)
    assert out.read_bytes() == one
    assert [f"{out}: 5 completions" in text for text in said] == [True] + [False] * (count - 1)
    # A killed job goes on behind its last whole line.
    out.write_bytes(b"".join(one.splitlines(keepends=True)[:3]) + b'{"index": 3, "pro')
    assert "3 of 5 are there already" in _run("generate", *flags, f"--out={out}", count=count)[0]
    assert out.read_bytes() == one


@pytest.mark.parametrize("count", [2, 4])
def test_measured_edits(run_folder, tmp_path, count):
    flags = [f"--workdir={run_folder}", "--measure=facts", "--pairs=4"]
    edit.main([*flags, f"--out={tmp_path / 'one'}"])
    said = _run("edit", *flags, f"--out={tmp_path / 'two'}", count=count)
    one = _files(tmp_path / "one")
    assert len(one) == 2 and _files(tmp_path / "two") == one
    assert ["percent" in text for text in said] == [True] + [False] * (count - 1)


def test_an_analysis(run_folder, tmp_path):
    flags = [f"--workdir={run_folder}", "--text=facts", "--tokens=4096", "--rows=64"]
    analyze.main([*flags, f"--out={tmp_path / 'one'}"])
    _run("analyze", *flags, f"--out={tmp_path / 'two'}")
    one = _files(tmp_path / "one")
    assert "index.html" in one and _files(tmp_path / "two") == one


def test_out_and_back(run_folder, tmp_path):
    flags = [f"--workdir={run_folder}", "--format=hf", "--file-gib=0.0001"]
    export.main([*flags, f"--out={tmp_path / 'one'}"])
    _run("export", *flags, f"--out={tmp_path / 'two'}", count=4)
    one = _files(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in one) > 1
    assert _files(tmp_path / "two") == one
    back = tmp_path / "back"
    _run("import_torch", "--from=hf", f"--path={tmp_path / 'two'}", f"--workdir={back}")
    export.main([f"--workdir={back}", *flags[1:], f"--out={tmp_path / 'three'}"])
    # What the tokenizer came with is carried along from now on.
    weights = {name: one[name] for name in one if "tokenizer" not in name and "README" not in name}
    assert any(name.endswith(".safetensors") for name in weights)
    again = _files(tmp_path / "three")
    assert {name: again[name] for name in weights} == weights


def test_a_refusal_is_everybodys(run_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    said = _run("export", f"--workdir={run_folder}", "--format=hf", f"--out={out}", code=1)
    assert all(f"--out={out} exists" in text for text in said)
    patch = {"--workdir": run_folder, "--out": tmp_path / "x.jsonl", "--prompt": "a"}
    command = [f"{name}={value}" for name, value in patch.items()]
    with contextlib.ExitStack() as stack:
        every = gang("stem_jax.generate", command, [*command, "--seed=1"])
        processes = [stack.enter_context(one) for one in every]
        said = [finish(process, 1) for process in processes]
    assert all("process 1 differs from process 0 in --seed: 1, not 0" in text for text in said)
    assert not (tmp_path / "x.jsonl").exists()


def test_other_files_of_one_name_are_refused(run_folder, tmp_path):
    for process, prompts in ((0, PROMPTS), (1, PROMPTS[1:])):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "prompts").write_text("\n".join(prompts) + "\n")
    own = f"os.chdir(os.path.join({str(tmp_path)!r}, sys.argv[-1][-1]))"
    flags = [f"--workdir={run_folder}", "--prompt-file=prompts", f"--out={tmp_path / 'x.jsonl'}"]
    with contextlib.ExitStack() as stack:
        # The number of a process comes last.
        every = gang(
            "stem_jax.generate",
            *([*flags, f"--process-index={index}"] for index in (0, 1)),
            changes=f"import os, sys; {own}",
        )
        processes = [stack.enter_context(one) for one in every]
        said = [finish(process, 1) for process in processes]
    assert all("process 1 differs from process 0 in prompts" in text for text in said)
    assert not (tmp_path / "x.jsonl").exists()


def test_sigterm_ends_a_program(run_folder, tmp_path):
    (tmp_path / "prompts").write_text("\n".join(PROMPTS * 200) + "\n")
    out = tmp_path / "all.jsonl"
    flags = [f"--workdir={run_folder}", f"--prompt-file={tmp_path / 'prompts'}", f"--out={out}"]
    with contextlib.ExitStack() as stack:
        every = gang("stem_jax.generate", *[[*flags, "--batch-size=1"]] * 2)
        processes = [stack.enter_context(process) for process in every]
        while not (out.exists() and out.read_bytes().count(b"\n") > 3):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        for process in processes:
            process.terminate()
        assert [process.wait(60) for process in processes] == [-signal.SIGTERM] * 2
    assert out.read_bytes().count(b"\n") < 5 * 200


def test_json_alone_is_on_stdout(run_folder, tmp_path):
    flags = [f"--workdir={run_folder}", "--measure=facts", "--pairs=2", "--json"]
    flags += [f"--out={tmp_path / 'two'}"]
    with contextlib.ExitStack() as stack:
        every = gang("stem_jax.edit", flags, flags, stderr=subprocess.DEVNULL)
        processes = [stack.enter_context(one) for one in every]
        said = [finish(process) for process in processes]
    assert json.loads(said[0])["settings"]["pairs"] == 2 and not said[1]


def test_what_is_for_one_process(capsys):
    for program, argv in (
        (generate, ["--workdir=x", "--prompt=a", "--multihost"]),
        (edit, ["--workdir=x", "--swap=a=>b", "--multihost"]),
    ):
        with pytest.raises(SystemExit) as ended:
            program.main(argv)
        assert ended.value.code == 2 and "--multihost" in capsys.readouterr().err
