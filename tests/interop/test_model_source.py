"""Models in buckets and on the hub: exported there, imported from there."""

import pytest

from stem_jax import export, import_torch, staging
from stem_jax.bucket import list_objects, read_object
from stem_jax.errors import InputError
from stem_jax.interop.model_source import model_folder, model_source
from stem_jax.training.state import init_state
from tests.hub import COMMIT
from tests.saved_models import SIZES, save_run


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(staging, "_AGAIN_SECONDS", 0.01)
    yield
    for entry in list(staging._in_use):
        staging._give_back(entry)


@pytest.fixture(scope="module")
def run_folder(train_step, tmp_path_factory):
    step, folder = train_step(**SIZES), tmp_path_factory.mktemp("run")
    save_run(folder, step, init_state(step.blueprint))
    return folder


def _files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
@pytest.mark.parametrize("kind, last", [("hf", "config.json"), ("official", "params.json")])
def test_exports_go_to_a_bucket_and_come_back(s3_bucket, run_folder, tmp_path, kind, last):
    target = s3_bucket.path / "models" / kind
    flags = [f"--workdir={run_folder}", f"--format={kind}"]
    export.main([*flags, f"--out={target}"])
    export.main([*flags, f"--out={tmp_path / kind}"])
    here = _files(tmp_path / kind)
    there = {name: read_object(target / name).content for name in list_objects(target)}
    assert there.keys() == here.keys()
    assert {name for name in here if here[name] != there[name]} <= {"consolidated/params.json"}
    written = [path for method, path in s3_bucket.proxy.paths if method == "PUT"]
    assert written[-1].endswith(last)
    with pytest.raises(InputError, match=f"{kind} exists; choose another name"):
        export.main([*flags, f"--out={target}"])
    folder = tmp_path / "imported"
    import_torch.main([f"--from={kind}", f"--path={target}", f"--workdir={folder}"])
    assert (folder / "checkpoints" / "0").is_dir()


def test_a_model_that_is_not_there(bucket):
    with pytest.raises(InputError, match=r"^--path=.*/none: nothing is there; correct the name"):
        model_folder(model_source(f"{bucket.path}/none", "--path"), "--path")
    with pytest.raises(InputError, match="there is no bucket no-such-bucket"):
        model_folder(model_source(f"{bucket.scheme}://no-such-bucket/m", "--path"), "--path")


def test_a_model_of_the_hub(hub):
    folder = model_folder(model_source("hf://org/model", "--path"), "--path")
    assert _files(folder) == {"config.json": b"{}", "model.safetensors": b"weights"}
    assert COMMIT in str(folder)


@pytest.mark.parametrize(
    "status, code, match",
    [
        (404, "RepoNotFound", "the hub knows no such model, or HF_TOKEN may not see it"),
        (401, "RepoNotFound", "the hub knows no such model, or HF_TOKEN may not see it"),
        (403, "GatedRepo", "asks for its licence to be accepted; do so on its page"),
        (404, "RevisionNotFound", "there is no revision v2"),
        (403, "", "the hub refuses HF_TOKEN, or asks for one"),
        (503, "", "the hub answers 503; try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, status, code, match):
    hub.refused = status, code
    with pytest.raises(InputError, match=match) as said:
        model_folder(model_source("hf://org/model@v2", "--path"), "--path")
    assert str(said.value).startswith("--path=hf://org/model@v2") and "\n" not in str(said.value)


def test_no_network(hub, monkeypatch):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(InputError, match=r"cannot be reached \(.*\); look at the network") as said:
        model_folder(model_source("hf://org/model", "--path"), "--path")
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("text", ["hf://model", "hf://a/b/c", "hf://"])
def test_what_is_no_name_of_the_hub(text):
    with pytest.raises(InputError, match=r"is no name of a model; give hf://ORG/NAME"):
        model_source(text, "--path")
