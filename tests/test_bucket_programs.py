"""What reads a run in a bucket, and writes results there: every program, and what it refuses."""

import json

import pytest

from stem_jax import bucket as objects
from tests.buckets import gs_nightly
from tests.test_bucket_run import Machine, flags

pytestmark = [pytest.mark.long, pytest.mark.little_effort]


@gs_nightly
def test_programs_read_it_and_write_there(bucket, tmp_path):
    workdir, results = bucket.path / "run", bucket.path / "results"
    machine, reader = Machine(bucket, tmp_path / "a"), Machine(bucket, tmp_path / "b")
    machine.program("train", *flags("tiny", workdir, train__steps=2))
    run = f"--workdir={workdir}"

    said = reader.program(
        "edit", run, "--swap=France=>Spain", "--prompt=The", f"--save={results}/p"
    )
    assert f"use it with generate --edits={results}/p" in said
    greedy = "--prompt=The", "--max-new-tokens=4", "--greedy", f"--edits={results}/p"
    for turn in ("", "note: 1 of 1 are there already"):
        said = reader.program("generate", run, *greedy, f"--out={results}/texts.jsonl")
        assert said == f"{results}/texts.jsonl: 1 completions\n", turn
    assert len((results / "texts.jsonl").read_text().splitlines()) == 1
    refused = reader.program("edit", run, "--swap=a=>b", f"--save={results}/p", code=1)
    assert refused == f"error: --save={results}/p exists; choose another name, or remove it first\n"

    said = reader.program("evaluate", run, "--perplexity=facts", "--limit=2")
    assert said.endswith(f"step 2 of {workdir}: {workdir}/evaluation/perplexity.json\n")
    out = f"--out={results}/e.json"
    reader.program("evaluate", run, "--perplexity=facts", "--limit=2", out)
    both = [workdir / "evaluation" / "perplexity.json", results / "e.json"]
    assert json.loads(both[0].read_text())["workdir"] == str(workdir)
    assert both[0].read_bytes() == both[1].read_bytes()

    exported, imported = bucket.path / "exported", bucket.path / "imported"
    reader.program("export", run, "--format=hf", f"--out={exported}")
    said = reader.program(
        "import_torch", "--from=hf", f"--path={exported}", f"--workdir={imported}"
    )
    assert f"{exported} is in {imported}, at step 0" in said
    assert "no record" not in reader.program("status", f"--workdir={imported}")
    begun = flags("tiny", bucket.path / "next", train__steps=2, train__init_from=str(imported))
    assert "beginning with checkpoint 0" in machine.program("train", *begun)


@gs_nightly
def test_what_is_not_there_is_refused_in_a_line(bucket, tmp_path):
    machine = Machine(bucket, tmp_path / "a")
    for program in ("generate", "status"):
        argv = [f"--workdir={bucket.path}/none"] + ["--prompt=a"] * (program == "generate")
        said = machine.program(program, *argv, code=1)
        assert said == f"error: --workdir={bucket.path}/none: nothing is there; correct the name\n"
    assert not objects.list_objects(bucket.path)


def test_who_may_not_is_told_in_a_line(s3_bucket, tmp_path):
    machine = Machine(s3_bucket, tmp_path / "a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        machine.environment[name] = ""
    workdir = s3_bucket.path / "run"
    said = machine.program("train", *flags("tiny", workdir), code=1).splitlines()[-1]
    assert said.startswith(f"error: --workdir={workdir}: no credentials for the bucket")


def test_rows_on_disk_go_on_where_that_disk_is(s3_bucket, tmp_path):
    workdir, disk = s3_bucket.path / "run", tmp_path / "disk"
    keys = {"tables__resident_rows": 256, "tables__host_rows": 64, "tables__disk": str(disk)}
    machine, other = Machine(s3_bucket, tmp_path / "a"), Machine(s3_bucket, tmp_path / "b")
    machine.program("train", *flags("tiny_offload", workdir, train__steps=4, **keys))
    out = machine.program("train", *flags("tiny_offload", workdir, train__steps=8, **keys))
    assert "resuming from step 4" in out
    disk.rename(tmp_path / "gone")
    # As on a machine that has not that disk.
    said = other.program("train", *flags("tiny_offload", workdir, **keys), code=1)
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and "disk" in last, said
    assert "damaged_checkpoints" not in " ".join(objects.list_objects(workdir))
