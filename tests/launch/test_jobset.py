"""launch/jobset.yaml: pods as Kubernetes takes them, its own fields as JobSet documents them."""

import copy

import kubernetes_validate
import pytest
import yaml
from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

from stem_jax import train
from stem_jax.cli import Parser
from stem_jax.processes.cluster import EXIT_FAILED, EXIT_NOT_JOINED
from stem_jax.processes.watchdog import EXIT_STUCK
from tests.children import ROOT

# Fields of v1alpha2 and the values that some of them may have, after
# https://github.com/kubernetes-sigs/jobset/blob/main/api/jobset/v1alpha2/jobset_types.go
# (reference: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/). A Job's template is
# Kubernetes' own.
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
ACTIONS += ["RestartJob", "RestartJobAndIgnoreMaxRestarts"]
FIELDS = {
    "replicatedJobs": {"name": str, "groupName": str, "template": dict, "replicas": int},
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "successPolicy": {"operator": ["All", "Any"], "targetReplicatedJobs": list},
    "failurePolicy": {
        "maxRestarts": int,
        "restartStrategy": ["Recreate", "BlockingRecreate", "InPlaceRestart"],
        "rules": list,
    },
    "suspend": bool,
    "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
    "managedBy": str,
    "ttlSecondsAfterFinished": int,
}
RULE = {
    "name": str,
    "action": ACTIONS,
    "onJobFailureReasons": list,
    "onJobFailureMessagePatterns": list,
    "targetReplicatedJobs": list,
}
# Why a Job fails, https://kubernetes.io/docs/concepts/workloads/controllers/job/
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded"}
REASONS |= {"PodFailurePolicy"}


@pytest.fixture
def jobset():
    return yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())


def check(found: dict, fields: dict, where: str) -> None:
    """Fails for a field that is none, or a value of another kind."""
    for key, value in found.items():
        assert key in fields, f"{where}.{key} is no field of JobSet"
        kind = fields[key]
        if isinstance(kind, list):
            assert value in kind, f"{where}.{key}={value}"
        elif isinstance(kind, dict):
            for item in value if isinstance(value, list) else [value]:
                check(item, kind, f"{where}.{key}")
        else:
            assert type(value) is kind, f"{where}.{key}={value!r}"


def check_own(jobset: dict) -> None:
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    check(jobset["spec"], FIELDS, "spec")
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        check(rule, RULE, "rules")
        assert set(rule.get("onJobFailureReasons", ())) <= REASONS


def job_of(jobset: dict) -> dict:
    """The Job that JobSet makes of the template."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}} | replicated[
        "template"
    ]


def test_its_fields(jobset):
    check_own(jobset)
    wrong = copy.deepcopy(jobset)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match=r"spec\.failurePolicy\.maxRestart is no field"):
        check_own(wrong)
    wrong = copy.deepcopy(jobset)
    wrong["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    with pytest.raises(AssertionError, match=r"rules\.action=Fail"):
        check_own(wrong)


def test_its_job_and_pods(jobset):
    job = job_of(jobset)
    kubernetes_validate.validate(job, "1.34", strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
    kubernetes_validate.validate(pod | job["spec"]["template"], "1.34", strict=True)
    wrong = copy.deepcopy(job)
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.34", strict=True)


def test_what_ends_it(jobset):
    """Refusals fail it, whatever else happens begins again."""
    spec = job_of(jobset)["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    refused = rule["onExitCodes"]["values"]
    assert refused == [1, 2] and not {EXIT_FAILED, EXIT_NOT_JOINED, EXIT_STUCK} & set(refused)
    (container,) = spec["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    # Kubernetes takes such a policy with this alone; any failure of a pod is then the Job's.
    assert spec["template"]["spec"]["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    (failed,) = jobset["spec"]["failurePolicy"]["rules"]
    assert failed["action"] == "FailJobSet"
    assert failed["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_its_command(jobset, monkeypatch):
    command = job_of(jobset)["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "stem_jax.train"]
    parsed = []
    parse = Parser.parse_args

    def noted(parser, argv):
        parsed.append(parse(parser, argv))
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", noted)
    with pytest.raises(SystemExit):
        train.main(command[3:])
    assert parsed[0].multihost and parsed[0].stopped_status == EXIT_NOT_JOINED
    assert parsed[0].coordinator is None and parsed[0].workdir.is_absolute()


def test_jax_finds_its_processes(jobset, monkeypatch):
    """By what GKE sets in each pod of a JobSet of TPU slices."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    hosts, slices = replicated["template"]["spec"]["parallelism"], replicated["replicas"]
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_PROCESS_ADDRESSES", raising=False)
    monkeypatch.setattr(GkeTpuCluster, "wait_for_coordinator", lambda *_: None)
    numbers = []
    for number in range(slices):
        names = [f"stem-slice-{number}-{host}.stem" for host in range(hosts)]
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", ",".join(names))
        monkeypatch.setenv("MEGASCALE_NUM_SLICES", str(slices))
        monkeypatch.setenv("MEGASCALE_SLICE_ID", str(number))
        monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "stem-slice-0-0.stem:8080")
        for host in range(hosts):
            monkeypatch.setenv("TPU_WORKER_ID", str(host))
            assert GkeTpuCluster.is_env_present()
            assert GkeTpuCluster.get_process_count() == hosts * slices == 8
            address = GkeTpuCluster.get_coordinator_address(1, "8476")
            assert address == "stem-slice-0-0.stem:8476"
            numbers.append(GkeTpuCluster.get_process_id())
    assert numbers == list(range(8))
